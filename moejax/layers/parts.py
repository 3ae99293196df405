"""What the rest of the house knows of a part of a layer, and all that it may ask.

A *part* is one branch of a block: something that mixes tokens (attention, a recurrence) or something that treats each
token by itself (a dense layer, a mixture of experts). Its configuration, a :class:`PartConfig`, answers questions of
size, placement, memory and initial weights; its module, a :class:`Part`, runs. Nobody else tests what type a part has,
so a part defined outside of the package is as good as ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.layers.rotary import Rotary, Rotation
from moejax.routing import Routing
from moejax.rules import Reading

Axes = tuple[str | None, ...]
"""The logical name of each axis of a leaf; an axis named ``None`` is never split over devices."""

Role = Literal["expert", "router"]
"""``"expert"``: the leaf has one entry for each expert. ``"router"``: the leaf decides where tokens go."""

Cache = Any
"""What a part keeps of earlier tokens, a pytree; ``None`` for a part that keeps nothing."""


@dataclass(frozen=True)
class Sizes:
    """Counts and widths of a part. What a part does not have is zero.

    Attributes:
        num_experts: expert ids ``E`` that a slot may name: first experts with weights, then without, then null routes.
        num_weighted: how many of these ids have weights. They come first.
        num_null: how many of these ids, the last, select no expert at all.
        num_selected: routed slots of a token ``K``.
        num_router_outputs: logits of the router ``R``.
        num_shared: shared experts under the gate ``shared``.
        expert_dim: hidden units of an expert ``F``.
        shared_dim: hidden units of the shared experts together.
        dense_dim: hidden units of a dense layer.
        num_heads, num_kv_heads: query heads ``H``, and heads ``G`` of keys and values.
        head_dim: width ``C`` of a head's output.
        window: how many tokens back a token sees, itself included; zero for all.
        couples_sequences: the result for one sequence depends on the other sequences of its batch.
        packed: the format in which experts are held (:data:`moejax.ops.packed.FORMATS`); empty for plain arrays.
    """

    num_experts: int = 0
    num_weighted: int = 0
    num_null: int = 0
    num_selected: int = 0
    num_router_outputs: int = 0
    num_shared: int = 0
    expert_dim: int = 0
    shared_dim: int = 0
    dense_dim: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    window: int = 0
    couples_sequences: bool = False
    packed: str = ""


NOTHING = Sizes()
"""The sizes of a part that is missing."""


class ActivationSizes(NamedTuple):
    """Estimated numbers (not bytes) that a part holds in a pass that is differentiated.

    Attributes:
        kept: held from the forward to the backward pass, for all tokens.
        largest: the largest temporary of one target in the backward pass.
        unrouted: temporaries of one target for what every token runs through, beside the largest.
        unpacked: values of packed matrices that are held in full while the part runs, for all targets together.
    """

    kept: int = 0
    largest: int = 0
    unrouted: int = 0
    unpacked: int = 0


class Call(NamedTuple):
    """What a part is given beside ``x``.

    Attributes:
        reading: rule, gates, ledger and taps of this layer.
        rotation: cosine and sine of each token for the block's rotary positions; ``None`` without any.
        positions: the number of each token in its sequence, padding left out.
        mask: the keys (or cache positions) that each token may see; ``None`` for all up to its own.
        distance: how many positions back each key lies.
        valid: true for tokens that are not padding.
        start: the first cache position to write; unused without a cache.
        key: randomness of a training step; ``None`` when nothing is random.
        carry: what the block below handed to this one (:attr:`Aux.carry`).
    """

    reading: Reading = Reading()
    rotation: Rotation | None = None
    positions: Int[Array, "B T"] | None = None
    mask: Bool[Array, "B T S"] | None = None
    distance: Int[Array, "T S"] | None = None
    valid: Bool[Array, "B T"] | None = None
    start: Int[Array, ""] | int = 0
    key: PRNGKeyArray | None = None
    carry: Float[Array, "B T R"] | None = None


class Aux(NamedTuple):
    """What a part tells beside its output.

    Attributes:
        routing: where tokens went, by expert id; ``None`` for a part that routes nothing.
        loss: weighted sum of the part's auxiliary losses; ``None`` for a part that leaves the weighting to the trainer.
        info: the losses one by one and what else the part reports, detached.
        carry: what the next block is given.
    """

    routing: Routing | None = None
    loss: Float[Array, ""] | None = None
    info: Mapping[str, Array] = {}
    carry: Float[Array, "B T R"] | None = None


@runtime_checkable
class Part(Protocol):
    """One branch of a block, an immutable pytree."""

    def run(self, x: Float[Array, "B T D"], call: Call, cache: Cache = None) -> tuple[Array, Cache, Aux]:
        """The branch's output ``[B T D]``, the cache with this call's tokens in it, and what there is to tell."""
        ...


class PartConfig(ABC):
    """The architecture of a part: a frozen dataclass that describes the part to everybody else.

    A subclass must have ``model_dim``, ``sizes`` and ``init``. The other answers have defaults, which fit a part that
    routes nothing, keeps nothing and is copied to every device.
    """

    model_dim: int
    """Width ``D`` of the residual stream."""

    @property
    @abstractmethod
    def sizes(self) -> Sizes:
        """Counts and widths."""

    @abstractmethod
    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> Part:
        """The part with random weights."""

    @property
    def rotary(self) -> Rotary | None:
        """Rotary positions of the part's queries and keys; by default none."""
        return None

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Logical axes of the part's leaves by their paths within it. A leaf that is left out lies on every device.

        Names that the standard sharding rules know: ``expert``, ``heads``, ``kv_heads``, ``hidden``, ``vocab``.
        """
        return {}

    @property
    def roles(self) -> Mapping[str, Role]:
        """Which leaves are experts or router; by default those whose first axis is ``expert``, and ``router.*``."""
        roles: dict[str, Role] = {path: "router" for path in self.axes if path.startswith("router.")}
        roles.update((path, "expert") for path, axes in self.axes.items() if axes[:1] == ("expert",))
        return roles

    @property
    def leaks(self) -> frozenset[str]:
        """Names under which the ledger books what the part does not conserve under any rule; by default none."""
        return frozenset()

    def init_cache(self, batch: int, positions: int, dtype: DTypeLike) -> Cache:
        """An empty cache for ``positions`` tokens of ``batch`` sequences; by default the part keeps nothing."""
        return None

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        """Estimated numbers held in a differentiated pass over ``batch`` sequences of ``tokens``.

        Args:
            itemsize: bytes of an activation, which may decide between implementations.
        """
        return ActivationSizes()

    def on_mesh(self, mesh: Mesh | None) -> Self:
        """The same architecture with weights laid over ``mesh``, whose axis ``expert`` may split the experts."""
        return self

    def pack(self, packed: str) -> Self:
        """The same architecture with experts held in the format ``packed``, where the part has experts that can be."""
        return self


class NoPart(NamedTuple):
    """The answers for a half of a block that is missing."""

    sizes: Sizes = NOTHING
    rotary: Rotary | None = None
    axes: Mapping[str, Axes] = {}
    roles: Mapping[str, Role] = {}
    leaks: frozenset[str] = frozenset()

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        """Nothing."""
        return ActivationSizes()


def leaf_at(part: Any, path: str) -> Any:
    """The leaf (or packed matrix) at a dotted path within a part; ``None`` if the part does not have it."""
    if isinstance(part, Mapping):
        return part.get(path)
    name, _, rest = path.partition(".")
    found = getattr(part, name, None)
    return leaf_at(found, rest) if rest else found


def cast(part: Any, dtype: DTypeLike) -> Any:
    """The part with every leaf in ``dtype``."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), part)
