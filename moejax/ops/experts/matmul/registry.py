"""The implementations of the grouped matmul by name.

A file in this package that uses :func:`register_matmul` is found by being there. A file outside of the package that
uses it is as good once it has been imported::

    @register_matmul("mine", priority=40, by_expert=True, supports=lambda x, weight, assignment: x.dtype == jnp.float32)
    def my_matmul(x, weight, assignment, transpose):
        ...
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from moejax.ops.experts.dispatch.assignment import Assignment
from moejax.ops.packed import Packed
from moejax.registry import Registry

Product = Callable[[Float[Array, "P *I"], Float[Array, "E *O D"] | Packed, Assignment, bool], Float[Array, "P *Z"]]
"""``product(x, weight, assignment, transpose)``: each row times the matrix of its expert.

Without ``transpose``, rows ``[P, D]`` become ``[P, *O]``: ``y[p] = W[e] x[p]``. With it, rows ``[P, *O]`` become ``[P,
D]``: ``y[p] = W[e]^T x[p]``, which is the gradient in ``x`` of the former. Rows without a slot may become anything.
"""

Supports = Callable[[Float[Array, "P D"], Float[Array, "E *O D"] | Packed, Assignment], bool]


@dataclass
class MatmulImplementation:
    """An implementation of the grouped matmul.

    Attributes:
        product: computes the product and the transposed product.
        supports: ``supports(x, weight, assignment)`` returns whether the default choice may take the implementation,
            for both products.
        priority: the default choice asks implementations of higher priority first.
        by_expert: the order of rows that it is written for (``Assignment.by_expert``); ``None`` for either order.
        packed_format: the format of matrices that it is written for; ``None`` for plain arrays, and for all formats,
            which it unpacks (:func:`moejax.ops.packed.unpack_in_turn`).
    """

    product: Product
    supports: Supports
    priority: int
    by_expert: bool | None
    packed_format: type[Packed] | None

    def accepts(self, weight: Float[Array, "E *O D"] | Packed, assignment: Assignment) -> bool:
        """Return whether the kind of the matrices and the order of the rows are those that it is written for."""
        in_order = self.by_expert is None or self.by_expert == assignment.by_expert
        return in_order and (self.packed_format is None or isinstance(weight, self.packed_format))


MATMULS: Registry[MatmulImplementation] = Registry("grouped matmul implementation", package=__package__)


def register_matmul(
    name: str,
    *,
    priority: int,
    supports: Supports = lambda x, weight, assignment: True,
    by_expert: bool | None = None,
    packed_format: type[Packed] | None = None,
) -> Callable[[Product], Product]:
    """Decorator that enters a product as an implementation of :func:`grouped_matmul`.

    Args:
        name: what users give as ``implementation``.
        priority: the package's own implementations have 10 (plain references), 20 and 30 (kernels).
        supports: as in :class:`MatmulImplementation`; by default it supports all that it accepts.
        by_expert: as in :class:`MatmulImplementation`.
        packed_format: as in :class:`MatmulImplementation`.

    Raises:
        ConfigError: another function has the name.
    """

    def enter(product: Product) -> Product:
        entry = MatmulImplementation(product, supports, priority, by_expert, packed_format)
        MATMULS.add(name, entry, origin=product)
        return product

    return enter
