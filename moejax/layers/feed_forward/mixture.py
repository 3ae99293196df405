"""The mixture of experts: route, multiply each token by its experts' matrices, add up, and add what is shared.

There is one mixture, for published families and for the layers that researchers register. A registered layer
(:class:`~moejax.layers.MoeLayer`) is this module with other steps under LibMoE's names; its leaves have the same paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.feed_forward.activation import GLU, HiddenActivation
from moejax.layers.feed_forward.expert_stack import ExpertStack
from moejax.layers.feed_forward.experts import EXPERT_AXES, Experts, buffer_rows, unpacked_values
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.feed_forward.shared import SHARED_AXES, SharedConfig, SharedExpert
from moejax.layers.parts import ActivationSizes, Aux, Axes, Call, PartConfig, Sizes
from moejax.ops.packed import FORMATS

MIXTURE_AXES: Mapping[str, Axes] = {
    # a router split like the experts would send scores around three times a layer to find the best of them
    "router.weight": (None, "model"),
    "router.bias": (None,),
    "router.selection_bias": (None,),
    **EXPERT_AXES,
    "bias": (None,),
    **SHARED_AXES,
}
"""Logical axes of a mixture's leaves."""


@dataclass(frozen=True)
class MixtureConfig(PartConfig):
    """Architecture of one mixture of experts.

    Attributes:
        model_dim: width of the residual stream ``D``.
        expert_dim: hidden units of an expert ``F``.
        router: which experts a token takes, and with which weights.
        unit: from an expert's first product to its hidden units.
        expert_bias: both products of an expert have biases.
        output_bias: one bias is added after the sum over experts.
        shared: what every token takes beside its experts; by default nothing.
        packed: the format in which the experts' matrices are held (:data:`moejax.ops.packed.FORMATS`), for inference
            and explanation only; empty for plain arrays.

    Raises:
        ConfigError: there is no such format, or it cannot hold rows of the experts' widths.
    """

    model_dim: int
    expert_dim: int
    router: RouterConfig
    unit: HiddenActivation = GLU()
    expert_bias: bool = False
    output_bias: bool = False
    shared: SharedConfig | None = None
    packed: str = ""

    def __post_init__(self) -> None:
        if self.packed:
            FORMATS.find(self.packed).check(self.model_dim, self.expert_dim)

    @property
    def sizes(self) -> Sizes:
        experts = self.router.num_experts
        return Sizes(
            num_experts=experts,
            num_weighted=experts,
            num_selected=self.router.num_selected,
            num_router_outputs=experts,
            num_shared=int(self.shared is not None),
            expert_dim=self.expert_dim,
            shared_dim=0 if self.shared is None else self.shared.hidden_dim,
            packed=self.packed,
        )

    @property
    def axes(self) -> Mapping[str, Axes]:
        return MIXTURE_AXES

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> "Mixture":
        return Mixture.init(key, self, dtype)

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        estimate = mixture_activations(self.sizes, self.model_dim, batch * tokens, itemsize)
        wide, dim = self.unit.branches * self.expert_dim, self.model_dim
        matrices = (wide, dim), (dim, self.expert_dim)
        return estimate._replace(unpacked=unpacked_values(self.packed, self.router.num_experts, *matrices))

    def on_mesh(self, mesh: Mesh | None) -> Self:
        return replace(self, router=replace(self.router, mesh=mesh))

    def pack(self, packed: str) -> Self:
        return replace(self, packed=packed)


def mixture_activations(sizes: Sizes, model_dim: int, rows: int, itemsize: int) -> ActivationSizes:
    """The estimate for a mixture of these sizes over ``rows`` tokens.

    A slot's output and the four factors of its gated units are kept. The largest temporaries are the buffers around an
    expert's first product, as large as they may become at run time.
    """
    s = sizes
    buffers = buffer_rows(rows, s.num_selected, s.num_experts, itemsize, model_dim, s.expert_dim)
    return ActivationSizes(
        kept=rows * (s.num_selected * (model_dim + 4 * s.expert_dim) + 4 * s.shared_dim),
        largest=(buffers + rows * s.num_selected) * (model_dim + 2 * s.expert_dim),
        unrouted=rows * (model_dim + 2 * s.shared_dim) if s.shared_dim else 0,
    )


@nnx.dataclass
class Mixture(nnx.Module):
    """Top-k mixture of experts.

    Attributes:
        router: where tokens go.
        experts: the routed experts.
        bias: added after the sum over experts.
        shared: what every token takes.
    """

    router: Router = nnx.data()
    experts: ExpertStack = nnx.data()
    bias: Float[Array, " D"] | None = nnx.data()
    shared: SharedExpert | None = nnx.data()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MixtureConfig, dtype: DTypeLike) -> Self:
        """Random weights, zero biases."""
        c, (k1, k2, k3, k4, k5) = config, jax.random.split(key, 5)
        sizes = c.router.num_experts, c.expert_dim, c.model_dim
        return cls(
            Router.init(k1, c.router, c.model_dim, dtype),
            Experts.init((k2, k3), *sizes, c.unit, bias=c.expert_bias, packed=c.packed, dtype=dtype),
            jnp.zeros(c.model_dim, dtype) if c.output_bias else None,
            None if c.shared is None else SharedExpert.init((k4, k5), c.shared, c.model_dim, dtype),
        )

    def run(self, x: Float[Array, "B T D"], call: Call, cache: None = None) -> tuple[Float[Array, "B T D"], None, Aux]:
        """The output, no cache, and the routing of every token; losses are left to the trainer."""
        reading = call.reading
        routing, assignment = self.router(x, reading)
        y = self.experts.mixed(x[:, :, None], assignment, routing.weights, routing.ids, reading)
        y = reading.add_bias(y, self.bias)
        y = y if self.shared is None else reading.rule.add(y, self.shared(x, reading))
        return y, None, Aux(routing)

    def after_step(self, load: Float[Array, " S"], info: Mapping[str, Array]) -> Self:
        """The mixture after an optimiser step; what is balanced or scheduled outside of the gradient changes here.

        Args:
            load: each expert's share of the routed slots, which sum to one; a mean over the step's micro-batches.
            info: what the mixture told in :attr:`Aux.info`, means likewise.
        """
        return self
