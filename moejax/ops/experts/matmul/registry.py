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
from moejax.ops.mxfp4 import MXFP4
from moejax.registry import Registry

Product = Callable[[Float[Array, "P *I"], Float[Array, "E *O D"] | MXFP4, Assignment, bool], Float[Array, "P *Z"]]
"""``product(x, weight, assignment, transpose)``: each row times the matrix of its expert.

Without ``transpose``, rows ``[P, D]`` become ``[P, *O]``: ``y[p] = W[e] x[p]``. With it, rows ``[P, *O]`` become ``[P,
D]``: ``y[p] = W[e]^T x[p]``, which is the gradient in ``x`` of the former. Rows without a slot may become anything.
"""

Supports = Callable[[Float[Array, "P D"], Float[Array, "E *O D"] | MXFP4, Assignment], bool]


@dataclass
class MatmulImplementation:
    """An implementation of the grouped matmul.

    Attributes:
        product: computes the product and the transposed product.
        supports: ``supports(x, weight, assignment)`` returns whether the default choice may take the implementation,
            for both products.
        priority: the default choice asks implementations of higher priority first.
        by_expert: the order of rows that it is written for (``Assignment.by_expert``); ``None`` for either order.
        mxfp4_only: True if it multiplies with matrices in MXFP4 alone.
    """

    product: Product
    supports: Supports
    priority: int
    by_expert: bool | None
    mxfp4_only: bool

    def accepts(self, weight: Float[Array, "E *O D"] | MXFP4, assignment: Assignment) -> bool:
        """Return whether the kind of the matrices and the order of the rows are those that it is written for."""
        in_order = self.by_expert is None or self.by_expert == assignment.by_expert
        return in_order and (isinstance(weight, MXFP4) or not self.mxfp4_only)


MATMULS: Registry[MatmulImplementation] = Registry("grouped matmul implementation", package=__package__)


def register_matmul(
    name: str,
    *,
    priority: int,
    supports: Supports = lambda x, weight, assignment: True,
    by_expert: bool | None = None,
    mxfp4_only: bool = False,
) -> Callable[[Product], Product]:
    """Decorator that enters a product as an implementation of :func:`grouped_matmul`.

    Args:
        name: what users give as ``implementation``.
        priority: the package's own implementations have 10 (plain references), 20 and 30 (kernels).
        supports: as in :class:`MatmulImplementation`; by default it supports all that it accepts.
        by_expert: as in :class:`MatmulImplementation`.
        mxfp4_only: as in :class:`MatmulImplementation`.

    Raises:
        ConfigError: another function has the name.
    """

    def enter(product: Product) -> Product:
        entry = MatmulImplementation(product, supports, priority, by_expert, mxfp4_only)
        MATMULS.add(name, entry, origin=product)
        return product

    return enter
