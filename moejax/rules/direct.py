"""Direct logit attribution as a rule (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021)."""

from dataclasses import dataclass

from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.rules.attnlrp import AttnLRP
from moejax.rules.rule import AttentionProduct, Slope


@dataclass(frozen=True)
class Direct(AttnLRP):
    """No relevance passes through a part of a layer: each part keeps the relevance that its output has at the head.

    The scale of the final norm is a constant. The relevance of the stream that enters each layer is the logit lens.
    """

    @property
    def leaks(self) -> frozenset[str]:
        return super().leaks | {"activation"}

    def gated(
        self,
        slope: Slope,
        gate: Float[Array, "*s"],
        up: Float[Array, "*s"],
        offset: float = 0.0,
        limit: float | None = None,
    ) -> Float[Array, "*s"]:
        return super().gated(slope, stop_gradient(gate), stop_gradient(up), offset, limit)

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        return product(stop_gradient(q), stop_gradient(k), stop_gradient(v))
