"""The mixture that researchers subclass, with one method for each step under the names of LibMoE's ``MoeLayer``.

A :class:`MoeLayer` is a :class:`~moejax.layers.Mixture` and holds nothing of a call. Running it makes a *view*: a copy
for that one call, which knows the call's reading, mask and randomness and collects what the steps record. The view is
the ``self`` of :meth:`MoeLayer.forward`, so that a method written for one call on arrays is also trained, explained and
intervened on inside of a decoder. What LibMoE writes on the module is returned as :class:`~moejax.layers.Aux`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.errors import ConfigError, MoejaxError
from moejax.layers.feed_forward.activation import GLU, Activation, HiddenActivation
from moejax.layers.feed_forward.call_view import Info, ViewedMixture
from moejax.layers.feed_forward.expert_stack import ExpertStack, combine
from moejax.layers.feed_forward.experts import Experts
from moejax.layers.feed_forward.initial_experts import Expert, stack_experts
from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.parts import Call, Sizes
from moejax.ops.experts import assign
from moejax.routing import SCORES, WEIGHTS, Routing, balance_loss, z_loss
from moejax.routing.statistics import diversity


class RouteCounts(NamedTuple):
    """What there is for a token to choose from.

    Attributes:
        experts: experts with weights.
        ids: expert ids: the experts with weights, then those of :meth:`MoeLayer.zero_computation_experts`.
        null: how many of the ids, the last, are null routes: selecting one selects no expert.
        slots: slots of a token, whether they carry something or not.
        router_outputs: outputs of the router ``R``.
    """

    experts: int
    ids: int
    null: int
    slots: int
    router_outputs: int


class MoeLayer(ViewedMixture):
    """Softmax top-k mixture of experts; override what is different.

    Args:
        in_embed_dim: input width ``D``.
        out_embed_dim: output width ``O``.
        num_of_experts: ``E``.
        num_selected: slots of a token ``K``.
        expert: what the experts are: any module ``[N D] -> [N O]``, of which every expert becomes a copy (sparse
            upcycling), a sequence with one for each expert, or a class or function that makes one; see
            :func:`~moejax.layers.stack_experts`. By default experts are drawn anew.
        args: settings, an :class:`MoeArgs` of the class's own kind, a mapping, or any object with such attributes.

    Raises:
        ConfigError: more slots than experts, or an expert of another width.
    """

    Args: ClassVar[type[MoeArgs]] = MoeArgs
    """The class of the layer's settings."""

    def __init__(
        self,
        in_embed_dim: int = 768,
        out_embed_dim: int = 768,
        num_of_experts: int = 4,
        num_selected: int = 2,
        expert: Expert | None = None,
        args: Any = None,
    ) -> None:
        args = self.Args.of(args)
        if not 1 <= num_selected <= num_of_experts:
            raise ConfigError(f"num_selected={num_selected} must lie between 1 and num_of_experts={num_of_experts}.")
        self.in_embed_dim, self.out_embed_dim = in_embed_dim, out_embed_dim
        self.num_of_experts, self.num_selected = num_of_experts, num_selected
        # of the class's own kind, which a type checker cannot know
        self.args: Any = replace(args, key=None)
        config = self.router_config()
        bias = jnp.zeros(config.num_experts) if config.selection_bias else None
        self.router = Router(_draw(self.init_gate_weights, args.std_gate, args.draw("gate")), None, bias, config)
        key = args.draw("experts")
        self.experts: ExpertStack = (
            _draw(self.init_expert_weights, args.std_expert, key)
            if expert is None
            else stack_experts(expert, self.counts.experts, in_embed_dim, out_embed_dim, key)
        )
        self.bias = self.shared = None
        self.add_weights(args)

    def add_weights(self, args: Any) -> None:
        """Set what a variant has beside router and experts; ``args.draw(name)`` gives a key for each."""

    # what there is to choose from

    @property
    def counts(self) -> RouteCounts:
        """What there is for a token to choose from; override with ``super().counts._replace(..)``."""
        experts = self.num_of_experts
        return RouteCounts(experts, experts, 0, self.num_selected, experts)

    @property
    def couples_sequences(self) -> bool:
        """True if the result for one sequence depends on the others of its batch; here through a capacity.

        Ablations, steps of a path and explained prompts then run one sequence at a time. Batched generation does not,
        and neither does :class:`moejax.Backtrace` on it.
        """
        return self.args.capacity_factor is not None

    @property
    def sizes(self) -> Sizes:
        """The counts and widths as every part of a decoder gives them."""
        c, shared = self.counts, self.shared
        return Sizes(
            num_experts=c.ids,
            num_weighted=c.experts,
            num_null=c.null,
            num_selected=c.slots,
            num_router_outputs=c.router_outputs,
            num_shared=int(shared is not None),
            expert_dim=self.experts.hidden_dim,
            shared_dim=0 if shared is None else shared.mlp.hidden_dim,
            couples_sequences=self.couples_sequences,
        )

    def router_config(self) -> RouterConfig:
        """How routes are scored, selected and weighed; :meth:`topk_expert` follows it."""
        return RouterConfig(self.counts.router_outputs, self.num_selected, "softmax", "renormalised")

    def zero_computation_experts(self, x: Float[Array, "B T D"]) -> Sequence[Float[Array, "B T O"] | None]:
        """Outputs of the experts without weights, for the ids after the others; ``None`` is an output of zero.

        The name is from MoE++ (Jin et al., arXiv 2410.07348).
        """
        return ()

    # initial weights

    def init_gate_weights(self, std: float = 0.02, *, key: PRNGKeyArray) -> Float[Array, "R D"]:
        """Initial weights of the router."""
        return self._initial(key, (self.counts.router_outputs, self.in_embed_dim), std)

    def init_expert_weights(self, std: float = 0.02, *, key: PRNGKeyArray) -> ExpertStack:
        """Initial experts, with zero biases. Not called for a layer that is given an ``expert``."""
        a, (k1, k2) = self.args, jax.random.split(key)
        unit: HiddenActivation = GLU(a.activation) if a.gated else Activation(a.activation)
        experts, hidden = self.counts.experts, a.expert_dim or self.out_embed_dim
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

    @property
    def gate_weight(self) -> Array:
        """The router's weight ``[R D]``, under LibMoE's name."""
        return self.router.weight

    def gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """Router logits in float32 or wider."""
        return self.router.logits(x, self.reading)

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        """Weights of the selected routes; the routes, best first; and the scores of all (:meth:`router_config`)."""
        return self.select(gate_logits)

    def select(self, gate_logits: Float[Array, "B T R"], score: Any = None, weigh: Any = None, **options: Any) -> Any:
        """:meth:`Router.select` under this call's gates; returns what :meth:`topk_expert` returns.

        Args:
            score, weigh: functions, or names in ``SCORES`` and ``WEIGHTS``; by default :meth:`router_config`'s.
            options: other arguments of :func:`moejax.routing.route`.
        """
        batch, tables = gate_logits.shape[:-1], {"score": (score, SCORES), "weigh": (weigh, WEIGHTS)}
        for name, (given, table) in tables.items():
            if given is not None:
                options[name] = table[given] if isinstance(given, str) else given
        score_all, reading = options.get("score", SCORES[self.router.config.score]), self.reading
        options["score"] = lambda z: reading.node("router_scores", score_all(z))
        routing = self.router.select(
            gate_logits,
            selectable=self.by_route("selectable", batch),
            weight_factors=self.by_route("routing_weights", batch),
            **options,
        )
        return routing.weights, routing.ids, routing.scores

    def by_route(self, gate: str, batch: tuple[int, ...]) -> Float[Array, "B T R"] | None:
        """This call's gates of that name (``selectable`` or ``routing_weights``) for every route, if there are any."""
        gates = self.reading.by_expert(gate, batch)
        return None if gates is None else gates[..., self.route_ids()]

    def route_ids(self) -> Int[Array, " R"]:
        """The expert id of every route."""
        return jnp.arange(self.counts.router_outputs)

    def routes_to_experts(
        self, selected_experts: Int[Array, "B T K"], weights: Float[Array, "B T K"]
    ) -> tuple[Int[Array, "B T K2"], Float[Array, "B T K2"]]:
        """Expert ids and weights of the slots from the selected routes; weight 0 carries nothing and costs nothing.

        The experts with weights among a token's slots that carry something must be distinct.
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
        ids, weights = self.routes_to_experts(selected_experts, weights)
        counts, slots, tokens = self.counts, ids.shape[-1], ids.shape[0] * ids.shape[1]
        dispatched = jnp.where(weights == 0, counts.ids, ids).reshape(-1, slots)
        assignment = assign(dispatched, counts.experts, allow_unassigned=True, mesh=self.mesh)
        if (factor := self.args.capacity_factor) is not None:
            slots_before = assignment.group_sizes.sum()
            assignment = assignment.limited(math.ceil(factor * tokens * self.num_selected / counts.experts))
            dropped = slots_before - assignment.group_sizes.sum()
            self.record("dropped", dropped / jnp.maximum(slots_before, 1))
        carries = (assignment.rank_in_expert >= 0).reshape(ids.shape)
        if expert_outputs is None:
            outputs = self.experts(x[:, :, None], assignment, self.reading)
        else:
            by_token = jnp.moveaxis(jnp.asarray(expert_outputs), 0, 2)
            outputs = jnp.take_along_axis(by_token, jnp.minimum(ids, counts.experts - 1)[..., None], axis=2)
        for expert_id, output in enumerate(self.zero_computation_experts(x), counts.experts):
            selected = ids == expert_id
            carries |= selected & (weights != 0)
            # where outputs of all experts were given, another expert's stands there
            outputs = jnp.where(selected[..., None], 0 if output is None else output[:, :, None], outputs)
        weights = self.reading.node("expert_weights", jnp.where(carries, weights, 0), ids)
        self.record("ids", ids)
        self.record("weights", weights)
        y = results + combine(outputs, weights, ids, self.reading)
        return (y, self.experts_diversity_loss(outputs, weights)) if return_topk_outputs else y

    # losses

    def zloss(
        self, gate_logits: Float[Array, "B T R"], gate_softmax: Float[Array, "B T R"] | None = None
    ) -> Float[Array, ""]:
        """Bounds the size of the logits: :func:`moejax.routing.z_loss`."""
        return z_loss(as_routing(None, gate_softmax, gate_logits), self.mask)

    def balanceloss(
        self, selected_experts: Int[Array, "B T K"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Even use of the experts: :func:`moejax.routing.balance_loss`; 1 at balance."""
        return self.balance(as_routing(selected_experts, gate_softmax, gate_softmax))

    def balance(self, routing: Routing, **options: Any) -> Float[Array, ""]:
        """:func:`moejax.routing.balance_loss` as the settings ask for it; LibMoE counts first choices by sequence."""
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
        self.record("scores", gate_softmax)
        self.record("logits", gate_logits)
        balance = self.balanceloss(selected_experts, gate_softmax)
        z = self.zloss(gate_logits, gate_softmax)
        return self.args.balance_loss_coef * balance + self.args.router_z_loss_coef * z, balance, z

    def experts_diversity_loss(
        self, outputs: Float[Array, "B T K O"], weights: Float[Array, "B T K"] | None = None
    ) -> Float[Array, ""]:
        """:func:`moejax.routing.statistics.diversity` of a token's selected outputs; weight zero is no output."""
        return diversity(outputs, self.mask, weights=weights)

    # a call

    def forward(
        self, x: Float[Array, "B T D"], return_id_experts: bool = False
    ) -> tuple[Float[Array, "B T O"], Float[Array, ""], None, Info]:
        """One call from its steps; override it for a layer of another shape. Returns what :meth:`__call__` returns.

        ``self`` is a view made for this call.
        """
        gate_logits = self.reading.node("router_logits", self.gate(x))
        weights, selected_experts, gate_softmax = self.topk_expert(gate_logits)
        output = self.compute_moe(selected_experts, weights, self.zeros(x), x)
        auxiliary_loss, balance, z = self.combine_loss(selected_experts, gate_softmax, gate_logits)
        return output, auxiliary_loss, None, {"balance_loss": balance, "router_z_loss": z}

    def zeros(self, x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        """Results to begin with."""
        return jnp.zeros((*x.shape[:-1], self.out_embed_dim), x.dtype)

    def __call__(
        self, x: Any, return_id_experts: bool = False, *, mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T O"], Float[Array, ""], None, Info]:
        """Output, auxiliary loss, ``None`` (where LibMoE once had ids), and what there is to log, detached.

        Args:
            x: tokens ``[B T D]``, an array of JAX or NumPy.
            return_id_experts: add to the last what LibMoE logs: ``selected_experts`` and ``weights`` ``[B T K]``,
                ``gate_softmax`` ``[B T R]`` and ``router_magine``, the difference of the two largest weights
                ``[B T]``.
            mask: tokens that are not padding.

        Raises:
            MoejaxError: ``x`` has another number of axes, another width, or is no array; or an overridden
                :meth:`forward` returns something else.
        """
        output, _, aux = self.run(self._checked(x), Call(valid=mask))
        info = dict(aux.info)
        if return_id_experts and (routing := aux.routing) is not None:
            info |= {"selected_experts": routing.ids, "weights": routing.weights, "gate_softmax": routing.scores}
            info["router_magine"] = _margin(routing.weights)
        assert aux.loss is not None
        return output, aux.loss, None, jax.tree.map(jax.lax.stop_gradient, info)

    def _checked(self, x: Any) -> Float[Array, "B T D"]:
        """The tokens as an array of JAX."""
        name = type(self).__name__
        if not isinstance(x, jax.Array | np.ndarray):
            raise MoejaxError(f"{name} takes an array [B T D], not {type(x).__name__}; jnp.asarray(x) may make one.")
        if x.ndim != 3 or x.shape[-1] != self.in_embed_dim:
            hint = "; add an axis of sequences: x[None]" if x.ndim == 2 and x.shape[-1] == self.in_embed_dim else ""
            raise MoejaxError(f"{name} takes [B T D] with D={self.in_embed_dim}, not {tuple(x.shape)}{hint}.")
        return jnp.asarray(x)


def _draw(init: Callable[..., Any], std: float, key: PRNGKeyArray) -> Any:
    """Initial weights; an override that is written as in LibMoE takes no key, and draws as it likes."""
    parameters = inspect.signature(init).parameters.values()
    takes_key = any(p.name == "key" or p.kind is p.VAR_KEYWORD for p in parameters)
    drawn = init(std, key=key) if takes_key else init(std)
    if drawn is None:
        raise MoejaxError(f"{init.__qualname__} returned None; it returns the initial weights and assigns nothing.")
    return drawn


def as_routing(selected: Array | None, scores: Array | None, logits: Array) -> Routing:
    """The arrays as a :class:`Routing` in which every selected slot counts."""
    ids = jnp.zeros((*logits.shape[:-1], 1), jnp.int32) if selected is None else selected
    return Routing(logits, logits if scores is None else scores, ids, jnp.ones(ids.shape, logits.dtype))


def _margin(weights: Float[Array, "B T K"]) -> Float[Array, "B T"]:
    best = jax.lax.top_k(weights, min(2, weights.shape[-1]))[0]
    return best[..., 0] - (best[..., 1] if best.shape[-1] > 1 else 0)
