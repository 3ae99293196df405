"""AttnLRP (Achtibat et al., ICML 2024, arXiv 2402.05602) in the gradient convention of Arras et al. (arXiv 2502.15886).

With ``c = R / x`` the epsilon rule on a linear map is its ordinary VJP, so AttnLRP needs no method for linear maps.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.ops.cotangents import (
    elementwise,
    elementwise_identity,
    scale_cotangent,
    share_by_size,
    uniform_product,
)
from moejax.rules.registry import register_rule
from moejax.rules.rule import AttentionProduct, Rule, Slope, Total, activate, over_slots

Router = Literal["constant", "uniform", "gradient", "proportional"]


@register_rule(
    "attnlrp",
    variants={
        "attnlrp-uniform": {"router": "uniform"},
        "attnlrp-gradient": {"router": "gradient"},
        "attnlrp-proportional": {"router": "proportional"},
    },
)
@dataclass(frozen=True)
class AttnLRP(Rule):
    """AttnLRP: identity rule on norms and activations, uniform rule on products, Taylor rule on the attention softmax.

    Attributes:
        router: how much relevance of an expert's weighted output flows into its routing weight.
            ``"constant"``: none, the expert's output receives all of it (conserves).
            ``"uniform"``: one half to each factor, then the ordinary VJP through softmax and top-k, as LXT ships for
            Qwen3-MoE. The ledger books what the router's softmax does not conserve as ``router``.
            ``"gradient"``: the ordinary product rule, which passes all of it to both factors (booked likewise).
            ``"proportional"``: none, and the weighted outputs share every dimension of the mixture by their size
            (conserves). An expert that works against the target cannot be seen then.

    Raises:
        ValueError: ``router`` is another word.
    """

    router: Router = "constant"

    def __post_init__(self) -> None:
        if self.router not in get_args(Router):
            raise ValueError(f"router={self.router!r} is not a router rule; choose from {', '.join(get_args(Router))}.")

    @property
    def leaks(self) -> frozenset[str]:
        return frozenset({"softmax", "bias"} | ({"router"} if self.router in ("uniform", "gradient") else set()))

    def norm(self, x: Float[Array, "*b D"], inverse_rms: Float[Array, "*b 1"]) -> Float[Array, "*b D"]:
        """Identity rule (Prop. 3.4): the statistic is a constant."""
        return x * stop_gradient(inverse_rms)

    def gated(
        self,
        slope: Slope,
        gate: Float[Array, "*s"],
        up: Float[Array, "*s"],
        offset: float = 0.0,
        limit: float | None = None,
    ) -> Float[Array, "*s"]:
        """Identity rule on ``a(g) = g * slope(g)``, uniform rule (Prop. 3.3) on its product with ``up``.

        The product with the constant ``offset`` depends on ``gate`` alone, which receives all its relevance.
        """

        def unit(gate: Array, up: Array) -> Array:
            gate, up = self.limited(gate, up, limit)
            return uniform_product(self.activation(slope, gate), up, offset)

        return elementwise(unit, gate, up)

    def activation(self, slope: Slope, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Identity rule on ``a(x) = x * slope(x)``: the slope is a constant."""
        return activate(lambda g: stop_gradient(slope(g)), x)

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        """Uniform rule on both matrix products: values and pattern receive one half each; queries and keys share the
        pattern's half.
        """
        return product(scale_cotangent(q, 0.25), scale_cotangent(k, 0.25), scale_cotangent(v, 0.5))

    def gate_heads(self, gates: Float[Array, "*s"], heads: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The heads receive all relevance; the gate is a constant, since the sigmoid of zero is not zero."""
        return stop_gradient(gates) * heads

    def mix(self, weights: Float[Array, "*b K"], outputs: Float[Array, "*b K D"]) -> Float[Array, "*b K D"]:
        """Pass relevance to ``weights`` as ``router`` says."""
        if self.router in ("constant", "proportional"):
            return super().mix(stop_gradient(weights), outputs)
        product = super().mix(weights, outputs)
        return scale_cotangent(product, 0.5) if self.router == "uniform" else product

    def combine(self, terms: Float[Array, "*b K D"], total: Total = over_slots) -> Float[Array, "*b D"]:
        """Ordinary sum, or shared by size if ``router`` is ``"proportional"``."""
        return share_by_size(terms, total) if self.router == "proportional" else super().combine(terms, total)

    def clamp(self, x: Float[Array, "*s"], low: float, high: float) -> Float[Array, "*s"]:
        """Identity rule: saturated units keep their relevance."""
        return elementwise_identity(x, jnp.clip(x, low, high))
