"""Running a mixture through a view: a copy made for one call, which knows the call and collects what it records."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moejax.errors import MoejaxError
from moejax.layers.feed_forward.mixture import Mixture
from moejax.layers.feed_forward.router import Router
from moejax.layers.parts import Aux, Call, Sizes
from moejax.routing import Routing
from moejax.rules import Reading

Info = dict[str, Array]
Forward = tuple[Float[Array, "B T O"], Float[Array, ""], None, Info]
"""Output, auxiliary loss, ``None``, and what there is to log."""

_ROUTER_LEAVES = {"gate_weight": "weight", "router_bias": "selection_bias"}
"""LibMoE's names for leaves of the router."""


class _CallState(NamedTuple):
    """What a view knows of its call, and what the steps of the call recorded."""

    call: Call
    records: dict[str, Array]


class _ArraysAreData(type(nnx.Module)):
    """Metaclass: the arrays that ``__init__`` sets are leaves, traced or not; flax alone misses traced ones."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        layer = super().__call__(*args, **kwargs)
        for name, value in vars(layer).items():
            if isinstance(value, jax.Array):
                setattr(layer, name, nnx.data(value))
        return layer


class ViewedMixture(Mixture, metaclass=_ArraysAreData):
    """A mixture whose :meth:`forward` runs on a view of it. The mixture itself holds nothing of a call."""

    _state: _CallState | None = None

    @property
    def sizes(self) -> Sizes:
        """Counts and widths, as the parts of a decoder give them."""
        raise NotImplementedError

    def forward(self, x: Float[Array, "B T D"], return_id_experts: bool = False) -> Forward:
        """One call; ``self`` is a view made for it."""
        raise NotImplementedError

    @property
    def call(self) -> Call:
        """What this call was given; outside of a call, a call without rule, gates, mask and randomness."""
        return Call() if self._state is None else self._state.call

    @property
    def reading(self) -> Reading:
        """Rule, gates and ledger of this call; :meth:`gate`, :meth:`topk_expert` and :meth:`compute_moe` use it."""
        return self.call.reading

    @property
    def mask(self) -> Bool[Array, "B T"] | None:
        """Tokens of this call that are not padding, for the losses."""
        return self.call.valid

    @property
    def previous(self) -> Float[Array, "B T R"] | None:
        """What the layer below recorded as ``"carry"``."""
        return self.call.carry

    @property
    def key(self) -> PRNGKeyArray | None:
        """Randomness of a training step; ``None`` when nothing is to be random."""
        return self.call.key

    def record(self, name: str, value: Array) -> None:
        """Tell the caller of this call: ``"carry"`` for the next layer's :attr:`previous`, anything else as info."""
        if self._state is not None:
            self._state.records[name] = value

    @property
    def log_metrics(self) -> dict[str, Array]:
        """What this call has recorded, under LibMoE's name. To add to it, call :meth:`record`, or return it."""
        return {} if self._state is None else self._state.records

    @property
    def mesh(self) -> Mesh | None:
        """Devices over which the weights lie; over its axis ``expert`` the experts are split."""
        return self.router.config.mesh

    def run(
        self, x: Float[Array, "B T D"], call: Call = Call(), cache: None = None
    ) -> tuple[Float[Array, "B T O"], None, Aux]:
        """:meth:`forward` on a view of this layer; returns the output, no cache, and all that the call told."""
        state = _CallState(call, {})
        try:
            returned = self.replace(_state=state).forward(x, return_id_experts=True)
        except AttributeError as error:
            if isinstance(error.obj, jax.Array) and (hint := _OF_TORCH.get(error.name or "")):
                name = f"{type(self).__name__}.forward"
                raise MoejaxError(
                    f"{name} calls .{error.name}() on an array of JAX, which has none; {hint}."
                ) from error
            raise
        if not (isinstance(returned, tuple) and len(returned) == 4 and isinstance(returned[3], Mapping)):
            raise MoejaxError(
                f"{type(self).__name__}.forward returned {type(returned).__name__}; it returns four things: output, "
                "auxiliary loss, None, and a dictionary of what there is to log."
            )
        output, loss, _, info = returned
        told = {name: value for name, value in state.records.items() if name not in _ROUTING}
        info = jax.tree.map(jax.lax.stop_gradient, {**told, **info})
        routing = _recorded_routing(state.records, self.sizes.num_router_outputs)
        return output, None, Aux(routing, loss, info, state.records.get("carry"))

    def replace(self, **attributes: Any) -> Self:
        """A copy of the layer in which some attributes, arrays or pytrees of them, are others.

        ``gate_weight`` and ``router_bias`` name the router's weight and selection bias.
        """
        copy = jax.tree.map(lambda leaf: leaf, self)
        for name, value in attributes.items():
            if name in _ROUTER_LEAVES:
                copy.router = copy.router.with_leaves(**{_ROUTER_LEAVES[name]: value})
            else:
                setattr(copy, name, nnx.data(value))
        return copy

    def on_mesh(self, mesh: Mesh | None) -> Self:
        """A copy of the layer that knows over which devices its weights lie."""
        router, copy = self.router, jax.tree.map(lambda leaf: leaf, self)
        config = replace(router.config, mesh=mesh)
        copy.router = Router(router.weight, router.bias, router.selection_bias, config)
        return copy


_DETACHED = "leave .clone().detach() out: what a layer returns to be logged is detached"
_OF_TORCH = {
    "clone": _DETACHED,
    "detach": _DETACHED,
    "cpu": "leave it out",
    "to": "x.astype(dtype) changes a dtype",
    "float": "x.astype(jnp.float32) changes a dtype",
    "unsqueeze": "write x[..., None]",
    "view": "write x.reshape(..)",
    "permute": "write x.transpose(..)",
    "numel": "write x.size",
}
"""Methods of torch that layers call out of habit, and what to write."""

_ROUTING = ("ids", "weights", "scores", "logits", "carry")


def _recorded_routing(records: Mapping[str, Array], router_outputs: int) -> Routing | None:
    """Where tokens went, if :meth:`MoeLayer.compute_moe` ran; scores fall back to the weights themselves."""
    if "ids" not in records:
        return None
    ids, weights = records["ids"], records["weights"]
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    by_route = ((ids[..., None] == jnp.arange(router_outputs)) * weights[..., None]).sum(-2)
    return Routing(records.get("logits", by_route), records.get("scores", by_route), ids, weights)
