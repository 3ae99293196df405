"""The layer that researchers subclass: a router, stacked experts, auxiliary losses, and one method for each step.

The methods and names are those of LibMoE's ``MoeLayer``; what it mutates is returned here. A layer is an immutable
pytree. Calling it makes a copy that knows the call's surroundings (:attr:`MoeLayer.reading`, ``mask``, ``previous``,
``key``) and runs :meth:`MoeLayer.forward` on the copy, so that a method written for one call on arrays is also trained,
explained and intervened on inside of a decoder.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.feed_forward.activation import GLU, Activation, Unit
from moejax.layers.feed_forward.dense import MLP
from moejax.layers.feed_forward.experts import Experts, combine
from moejax.layers.linear import matmul_f32_accum
from moejax.ops.experts import assign
from moejax.ops.top_k import top_k
from moejax.routing import SCORES, WEIGHTS, Routing, balance_loss, route, z_loss
from moejax.routing.losses import Count, Scope
from moejax.routing.statistics import diversity
from moejax.rules import Reading

Info = dict[str, Array]


@dataclass(frozen=True)
class MoeArgs:
    """Settings of a layer, under LibMoE's names where it has one. Variants add their own in a subclass.

    Attributes:
        balance_loss_coef, router_z_loss_coef: weights of the two losses in the layer's auxiliary loss.
        init_weight: initial weights are normal with a small standard deviation; else uniform in ``1 / sqrt(inputs)``.
        std_gate, std_expert: those standard deviations.
        balance_scope, balance_count: as in :func:`moejax.routing.balance_loss`.
        capacity_factor: an expert takes at most this many times its fair share of a batch's slots, ``K`` for a token;
            later ones are dropped and counted as ``dropped``. By default none is ever dropped.
        expert_dim: hidden units of an expert, by default the layer's output width.
        activation, gated, expert_bias: what experts compute, where no ``expert`` is given.
        compat: ``"libmoe"`` computes what LibMoE's vision-language stack computes, where it differs from the
            published method.
        key: draws initial weights; not kept. Every layer of a decoder is given its own.
    """

    balance_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    init_weight: bool = True
    std_gate: float = 0.02
    std_expert: float = 0.02
    balance_scope: Scope = "batch"
    balance_count: Count = "selected"
    capacity_factor: float | None = None
    expert_dim: int | None = None
    activation: str = "gelu"
    gated: bool = False
    expert_bias: bool = True
    compat: Literal["libmoe"] | None = None
    key: PRNGKeyArray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.compat not in (None, "libmoe"):
            raise ConfigError(f"compat={self.compat!r} is unknown; it is None or 'libmoe'.")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(f"capacity_factor={self.capacity_factor} must be positive; None never drops a token.")

    def draw(self, name: str) -> PRNGKeyArray:
        """A key for the parameter of that name; without :attr:`key` always the same."""
        return jax.random.fold_in(jax.random.key(0) if self.key is None else self.key, zlib.crc32(name.encode()))

    @classmethod
    def of(cls, args: Any) -> Self:
        """Settings from an object of this class, a mapping of its fields, or any object with some of them.

        Raises:
            ConfigError: a mapping has a field that this class has not.
        """
        known = {f.name for f in fields(cls)}
        if args is None or isinstance(args, cls):
            return args or cls()
        if isinstance(args, Mapping):
            if unknown := sorted(set(args) - known):
                raise ConfigError(f"{cls.__name__} has no {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")
            return cls(**args)
        return cls(**{name: getattr(args, name) for name in known if hasattr(args, name)})


class Ran(NamedTuple):
    """What one call computed beside its output.

    Attributes:
        auxiliary_loss: weighted sum of its auxiliary losses.
        info: the losses one by one and what else the variant reports, detached.
        routing: by expert id; ``None`` for a layer that never asked its experts.
        carried: what the next layer's router is given as ``previous``.
    """

    auxiliary_loss: Float[Array, ""]
    info: Info
    routing: Routing | None
    carried: Float[Array, "B T R"] | None


class MoeLayer(nnx.Module):
    """Softmax top-k mixture of experts; override what is different.

    Args:
        in_embed_dim: input width ``D``.
        out_embed_dim: output width ``O``.
        num_of_experts: ``E``.
        num_selected: slots of a token ``K``.
        expert: an :class:`~moejax.layers.MLP`, of which every expert becomes a copy (sparse upcycling), or a sequence
            with one for each expert; by default they are drawn anew.
        args: settings, an :class:`MoeArgs` of the class's own kind, a mapping, or any object with such attributes.

    Raises:
        ConfigError: more slots than experts, or an expert of another width.

    Attributes:
        reading: rule and gates of this call; :meth:`gate`, :meth:`topk_expert` and :meth:`compute_moe` use it.
        mask: tokens that are not padding, for the losses.
        previous: what the layer below carried.
        key: randomness of a training step; ``None`` when there is to be none.
    """

    Args: ClassVar[type[MoeArgs]] = MoeArgs
    """The class of the layer's settings."""
    mesh: Mesh | None = None
    """Devices over whose axis ``expert`` the experts are split, if they are."""
    num_shared: int = 0
    """1 if :meth:`forward` has a shared expert under the gate ``shared``."""

    reading: Reading = Reading()
    mask: Bool[Array, "B T"] | None = None
    previous: Float[Array, "B T R"] | None = None
    key: PRNGKeyArray | None = None
    _notes: "_Notes | None" = None

    def __init__(
        self,
        in_embed_dim: int = 768,
        out_embed_dim: int = 768,
        num_of_experts: int = 4,
        num_selected: int = 2,
        expert: MLP | Sequence[MLP] | None = None,
        args: Any = None,
    ) -> None:
        args = self.Args.of(args)
        if not 1 <= num_selected <= num_of_experts:
            raise ConfigError(f"num_selected={num_selected} must lie between 1 and num_of_experts={num_of_experts}.")
        self.in_embed_dim, self.out_embed_dim = in_embed_dim, out_embed_dim
        self.num_of_experts, self.num_selected = num_of_experts, num_selected
        # of the class's own kind, which a type checker cannot know
        self.args: Any = replace(args, key=None)
        self.gate_weight = self.init_gate_weights(args.std_gate, key=args.draw("gate"))
        self.experts = (
            self.init_expert_weights(args.std_expert, key=args.draw("experts"))
            if expert is None
            else stack_experts(expert, self.num_routed, in_embed_dim, out_embed_dim)
        )
        self.add_weights(args)

    def add_weights(self, args: Any) -> None:
        """Set what a variant has beside router and experts; ``args.draw(name)`` gives a key for each."""

    def __setattr__(self, name: str, value: Any) -> None:
        # flax knows arrays by their type, and does not take a traced one for data
        super().__setattr__(name, nnx.data(value) if isinstance(value, jax.Array) else value)

    # what there is to choose from

    @property
    def num_routed(self) -> int:
        """Experts with weights that the router may choose."""
        return self.num_of_experts

    @property
    def num_routes(self) -> int:
        """Outputs of the router ``R``."""
        return self.num_ids

    @property
    def num_ids(self) -> int:
        """Expert ids: the routed experts, then those of :meth:`special`."""
        return self.num_routed

    @property
    def num_null(self) -> int:
        """Of the expert ids how many, the last, are null routes: who selects them selects nothing."""
        return 0

    @property
    def couples_sequences(self) -> bool:
        """Whether what a sequence yields depends on the others of its batch: here by places that they take.

        Interventions, steps of a path and prompts of :func:`moejax.explain_batch` are kept apart then. What is
        generated as a batch, and what :class:`moejax.Backtrace` explains of it, competed.
        """
        return self.args.capacity_factor is not None

    @property
    def num_slots(self) -> int:
        """Slots of a token, whether they carry something or not."""
        return self.num_selected

    def special(self, x: Float[Array, "B T D"]) -> Sequence[Float[Array, "B T O"] | None]:
        """Outputs of experts without a product, for the ids after the routed ones; ``None`` for zero."""
        return ()

    # initial weights

    def init_gate_weights(self, std: float = 0.02, *, key: PRNGKeyArray) -> Float[Array, "R D"]:
        """Initial weights of the router."""
        return self._initial(key, (self.num_routes, self.in_embed_dim), std)

    def init_expert_weights(self, std: float = 0.02, *, key: PRNGKeyArray) -> Experts:
        """Initial experts, with zero biases. Not called for a layer that is given an ``expert``."""
        a, (k1, k2) = self.args, jax.random.split(key)
        unit: Unit = GLU(a.activation) if a.gated else Activation(a.activation)
        experts, hidden = self.num_routed, a.expert_dim or self.out_embed_dim
        return Experts(
            self._initial(k1, (experts, unit.branches, hidden, self.in_embed_dim), std),
            self._initial(k2, (experts, self.out_embed_dim, hidden), std),
            jnp.zeros((experts, unit.branches, hidden)) if a.expert_bias else None,
            jnp.zeros((experts, self.out_embed_dim)) if a.expert_bias else None,
            unit,
        )

    def _initial(self, key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Array:
        if self.args.init_weight:
            return std * jax.random.normal(key, shape)
        bound = 1 / math.sqrt(shape[-1])
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    # the steps of a call

    def gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """Router logits in float32 or wider."""
        return self.reading.ledger_in("router", self.reading.linear(matmul_f32_accum, x, self.gate_weight))

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        """Weights of the selected routes, which sum to one; the routes, best first; and the scores of all."""
        return self.select(gate_logits, "softmax", "renormalised")

    def select(self, gate_logits: Float[Array, "B T R"], score: Any, weigh: Any, **options: Any) -> Any:
        """:func:`moejax.routing.route` under this call's gates; returns what :meth:`topk_expert` returns.

        ``score`` and ``weigh`` are functions, or names in ``SCORES`` and ``WEIGHTS``.
        """
        routing = route(
            gate_logits,
            self.num_selected,
            score=SCORES[score] if isinstance(score, str) else score,
            weigh=WEIGHTS[weigh] if isinstance(weigh, str) else weigh,
            selectable=self.by_route("selectable", gate_logits.shape[:-1]),
            weight_factors=self.by_route("routing_weights", gate_logits.shape[:-1]),
            top_k=partial(top_k, mesh=self.mesh),
            **options,
        )
        return routing.weights, routing.ids, routing.scores

    def by_route(self, gate: str, batch: tuple[int, ...]) -> Float[Array, "B T R"] | None:
        """This call's gates on choosing an expert (``selectable``) or on its weight (``routing_weights``), if there are any."""
        gates = self.reading.by_expert(gate, batch)
        return None if gates is None else gates[..., self.route_ids()]

    def route_ids(self) -> Int[Array, " R"]:
        """The expert id of every route."""
        return jnp.arange(self.num_routes)

    def resolve(
        self, selected_experts: Int[Array, "B T K"], weights: Float[Array, "B T K"]
    ) -> tuple[Int[Array, "B T S"], Float[Array, "B T S"]]:
        """Expert ids and weights of the slots from the selected routes; weight 0 carries nothing and costs nothing.

        The routed experts among a token's slots that carry something must be distinct.
        """
        return selected_experts, weights

    def compute_moe(
        self,
        selected_experts: Int[Array, "B T K"],
        weights: Float[Array, "B T K"],
        results: Float[Array, "B T O"],
        x: Float[Array, "B T D"],
        expert_outputs: Float[Array, "E B T O"] | None = None,
        return_topk_outputs: bool = False,
    ) -> Any:
        """``results`` plus the weighted sum of the selected experts' outputs.

        Args:
            expert_outputs: outputs of all experts, if they are known already.
            return_topk_outputs: return a pair of the sum and :meth:`experts_diversity_loss` of the slots.
        """
        ids, weights = self.resolve(selected_experts, weights)
        slots, tokens = ids.shape[-1], ids.shape[0] * ids.shape[1]
        dispatched = jnp.where(weights == 0, self.num_ids, ids).reshape(-1, slots)
        assignment = assign(dispatched, self.num_routed, allow_unassigned=True, mesh=self.mesh)
        if (factor := self.args.capacity_factor) is not None:
            whole = assignment.group_sizes.sum()
            assignment = assignment.limited(math.ceil(factor * tokens * self.num_selected / self.num_routed))
            self.note("dropped", (whole - assignment.group_sizes.sum()) / jnp.maximum(whole, 1))
        goes = (assignment.rank_in_expert >= 0).reshape(ids.shape)
        if expert_outputs is None:
            outputs = self.experts(x[:, :, None], assignment, self.reading)
        else:
            by_token = jnp.moveaxis(jnp.asarray(expert_outputs), 0, 2)
            outputs = jnp.take_along_axis(by_token, jnp.minimum(ids, self.num_routed - 1)[..., None], axis=2)
        for place, special in enumerate(self.special(x), self.num_routed):
            here = ids == place
            goes |= here & (weights != 0)
            # where outputs of all experts were given, there stands another's
            outputs = jnp.where(here[..., None], 0 if special is None else special[:, :, None], outputs)
        weights = jnp.where(goes, weights, 0)
        self.note("ids", ids)
        self.note("weights", weights)
        y = results + combine(outputs, weights, ids, self.reading)
        return (y, self.experts_diversity_loss(outputs, weights)) if return_topk_outputs else y

    # losses

    def zloss(
        self, gate_logits: Float[Array, "B T R"], gate_softmax: Float[Array, "B T R"] | None = None
    ) -> Float[Array, ""]:
        """Bounds the size of the logits: :func:`moejax.routing.z_loss`."""
        return z_loss(self.routing(None, gate_softmax, gate_logits), self.mask)

    def balanceloss(
        self, selected_experts: Int[Array, "B T K"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Even use of the experts: :func:`moejax.routing.balance_loss`; 1 at balance."""
        return self.balance(self.routing(selected_experts, gate_softmax, gate_softmax))

    def balance(self, routing: Routing, **options: Any) -> Float[Array, ""]:
        """:func:`moejax.routing.balance_loss` as the settings ask for it; LibMoE's counts first choices by sequence."""
        a = self.args
        scope, count = ("sequence", "first") if a.compat else (a.balance_scope, a.balance_count)
        return balance_loss(routing, self.mask, scope=scope, count=count, **options)

    def combine_loss(
        self,
        selected_experts: Int[Array, "B T K"],
        gate_softmax: Float[Array, "B T R"],
        gate_logits: Float[Array, "B T R"],
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """The weighted sum of the losses, and the two losses themselves."""
        self.note("scores", gate_softmax)
        self.note("logits", gate_logits)
        balance = self.balanceloss(selected_experts, gate_softmax)
        z = self.zloss(gate_logits, gate_softmax)
        return self.args.balance_loss_coef * balance + self.args.router_z_loss_coef * z, balance, z

    def experts_diversity_loss(
        self, outputs: Float[Array, "B T K O"], weights: Float[Array, "B T K"] | None = None
    ) -> Float[Array, ""]:
        """:func:`moejax.routing.statistics.diversity` of a token's selected outputs; weight zero is no output."""
        return diversity(outputs, self.mask, weights=weights)

    @staticmethod
    def routing(selected: Array | None, scores: Array | None, logits: Array) -> Routing:
        """The arrays as a :class:`Routing`, every selected slot counting."""
        ids = jnp.zeros((*logits.shape[:-1], 1), jnp.int32) if selected is None else selected
        return Routing(logits, logits if scores is None else scores, ids, jnp.ones(ids.shape, logits.dtype))

    # a call

    def forward(
        self, x: Float[Array, "B T D"], return_id_experts: bool = False
    ) -> tuple[Float[Array, "B T O"], Float[Array, ""], None, Info]:
        """One call from its steps; what a layer of another shape overrides. Returns what :meth:`__call__` returns."""
        gate_logits = self.gate(x)
        weights, selected_experts, gate_softmax = self.topk_expert(gate_logits)
        output = self.compute_moe(selected_experts, weights, self.zeros(x), x)
        auxiliary_loss, balance, z = self.combine_loss(selected_experts, gate_softmax, gate_logits)
        return output, auxiliary_loss, None, {"balance_loss": balance, "router_z_loss": z}

    def zeros(self, x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        """Results to begin with."""
        return jnp.zeros((*x.shape[:-1], self.out_embed_dim), x.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], return_id_experts: bool = False, *, mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T O"], Float[Array, ""], None, Info]:
        """Output, auxiliary loss, ``None`` (where ids once were), and what there is to log, detached.

        Args:
            x: tokens.
            return_id_experts: add to the last what LibMoE logs: ``selected_experts`` and ``weights`` ``[B T S]``,
                ``gate_softmax`` ``[B T R]`` and ``router_magine``, the difference of the two largest weights
                ``[B T]``.
            mask: tokens that are not padding.
        """
        output, ran = self.run(x, mask=mask)
        info = dict(ran.info)
        if return_id_experts and (routing := ran.routing) is not None:
            info |= {"selected_experts": routing.ids, "weights": routing.weights, "gate_softmax": routing.scores}
            info["router_magine"] = _margin(routing.weights)
        return output, ran.auxiliary_loss, None, jax.tree.map(jax.lax.stop_gradient, info)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        reading: Reading = Reading(),
        mask: Bool[Array, "B T"] | None = None,
        previous: Float[Array, "B T R"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T O"], Ran]:
        """A call in given surroundings: see the attributes of the class."""
        bound = self.replace(reading=reading, mask=mask, previous=previous, key=key)
        # lives as long as this call, so that a forward of any shape is read without being asked to report
        bound._notes = notes = _Notes()
        output, auxiliary_loss, _, info = bound.forward(x, return_id_experts=True)
        info = {**{name: notes.pop(name) for name in list(notes) if name not in _ROUTING}, **info}
        info = jax.tree.map(jax.lax.stop_gradient, info)
        return output, Ran(auxiliary_loss, info, notes.routing(self.num_routes), notes.get("carried"))

    def replace(self, **attributes: Any) -> Self:
        """A copy of the layer in which some attributes, arrays or pytrees of them, are others."""
        copy = jax.tree.map(lambda leaf: leaf, self)
        for name, value in attributes.items():
            setattr(copy, name, nnx.data(value))
        return copy

    def note(self, name: str, value: Array) -> None:
        """Tell the caller of this call: ``"carried"`` for the next layer's ``previous``, anything else as info."""
        if self._notes is not None:
            self._notes[name] = value

    @property
    def shared_dim(self) -> int:
        """Hidden units of what every token takes, for estimates of memory."""
        return 0

    def after_step(self, load: Float[Array, " S"], info: Info) -> Self:
        """The layer after an optimiser step in which ``load`` is each expert's share of slots; by default unchanged.

        For what is balanced or scheduled outside of the gradient. ``load``, which sums to one, and ``info`` are means
        over the step's micro-batches.
        """
        return self


_ROUTING = ("ids", "weights", "scores", "logits", "carried")


class _Notes(dict[str, Array]):
    """What the steps of one call noted."""

    def routing(self, num_routes: int) -> Routing | None:
        """Where tokens went, if :meth:`MoeLayer.compute_moe` ran; scores fall back to the weights themselves."""
        if "ids" not in self:
            return None
        ids, weights = self["ids"], self["weights"].astype(jnp.promote_types(self["weights"].dtype, jnp.float32))
        spread = ((ids[..., None] == jnp.arange(num_routes)) * weights[..., None]).sum(-2)
        return Routing(self.get("logits", spread), self.get("scores", spread), ids, weights)


def _margin(weights: Float[Array, "B T K"]) -> Float[Array, "B T"]:
    best = jax.lax.top_k(weights, min(2, weights.shape[-1]))[0]
    return best[..., 0] - (best[..., 1] if best.shape[-1] > 1 else 0)


def stack_experts(expert: MLP | Sequence[MLP], count: int, inputs: int, outputs: int) -> Experts:
    """``count`` experts: copies of one dense layer, or one from each of several.

    Raises:
        ConfigError: they do not have the layer's widths, one shape, or the right number.
    """
    several = [expert] * count if isinstance(expert, MLP) else list(expert)
    if len(several) != count:
        raise ConfigError(f"{len(several)} experts are given for a layer of {count}.")
    if not all(isinstance(e, MLP) for e in several):
        raise ConfigError(f"an expert is a moejax.layers.MLP, not a {type(several[0]).__name__}.")
    if len({e.config for e in several}) > 1:
        raise ConfigError("the experts that are given differ in their architecture; one stack needs one.")
    widths = several[0].input.shape[-1], several[0].output.shape[0]
    if widths != (inputs, outputs):
        raise ConfigError(f"an expert from {widths[0]} to {widths[1]} is given for a layer from {inputs} to {outputs}.")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    unit = several[0].config.unit
    return Experts(stacked.input, stacked.output, stacked.input_bias, stacked.output_bias, unit)
