"""The implementations of attention by name.

A file in this package that uses :func:`register_attention` is found by being there. A file outside of the package that
uses it is as good once it has been imported::

    @register_attention("mine", priority=40, supports=lambda q, k, v, causal: causal)
    def my_attention(q, k, v, mask, sinks, options):
        ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float

from moejax.registry import Registry

Edges = Float[Array, "B H T S"] | Callable[[Array], Array]
"""What multiplies the pattern ``[B H T S]``, or a function of the pattern that returns another one."""


class Options(NamedTuple):
    """The arguments of :func:`moejax.ops.attention.attention` that are known when a program is traced, and edges.

    Attributes:
        scale: multiplies the scores.
        causal: queries and keys are the same tokens in order, and no query sees a later one.
        window: with ``causal``, how many of the last keys each query sees; ``None`` for all.
        block: number of queries that an implementation which works by blocks takes at a time.
        edges: multiplies or changes the pattern; always ``None`` for implementations without ``reads_edges``.
    """

    scale: float
    causal: bool
    window: int | None
    block: int
    edges: Edges | None = None


Compute = Callable[..., Float[Array, "B T H Cv"]]
"""``compute(q, k, v, mask, sinks, options)``: the output of attention.

The mask is ``Bool[Array, "B T S"]``, or ``None`` if the implementation was registered with ``optional_mask``. The sinks
are ``Float[Array, " H"] | None``.
"""

Supports = Callable[[Float[Array, "B T H C"], Float[Array, "B S G C"], Float[Array, "B S G Cv"], bool], bool]


@dataclass
class AttentionImplementation:
    """An implementation of attention.

    Attributes:
        compute: computes the output.
        supports: ``supports(q, k, v, causal)`` returns whether the default choice may take the implementation.
        priority: the default choice asks implementations of higher priority first.
        reads_edges: True if it multiplies the pattern by edges.
        optional_mask: True if it takes ``None`` for a mask that is just the causal one; if False, it always gets an
            array.
    """

    compute: Compute
    supports: Supports
    priority: int
    reads_edges: bool
    optional_mask: bool


ATTENTIONS: Registry[AttentionImplementation] = Registry("attention implementation", package=__package__)


def register_attention(
    name: str,
    *,
    priority: int,
    supports: Supports = lambda q, k, v, causal: True,
    reads_edges: bool = False,
    optional_mask: bool = False,
) -> Callable[[Compute], Compute]:
    """Decorator that enters a function as an implementation of attention.

    Args:
        name: what users give as ``implementation``.
        priority: the package's own implementations have 10 (plain reference), 20 (blocks) and 30 (cuDNN's kernel).
        supports: as in :class:`AttentionImplementation`; by default it supports everything.
        reads_edges: as in :class:`AttentionImplementation`.
        optional_mask: as in :class:`AttentionImplementation`.

    Raises:
        ConfigError: another function has the name.
    """

    def enter(compute: Compute) -> Compute:
        entry = AttentionImplementation(compute, supports, priority, reads_edges, optional_mask)
        ATTENTIONS.add(name, entry, origin=compute)
        return compute

    return enter
