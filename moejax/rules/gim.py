"""GIM, gradient interaction modifications (Edin et al., arXiv 2505.17630)."""

from dataclasses import dataclass

from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.ops.cotangents import attach, scale_cotangent
from moejax.rules.attnlrp import AttnLRP
from moejax.rules.registry import register_rule
from moejax.rules.rule import AttentionProduct, Slope, activate


@register_rule("gim")
@dataclass(frozen=True)
class GIM(AttnLRP):
    """AttnLRP's frozen norms and halved products with the ordinary derivative of activations.

    The attention softmax is differentiated at a higher temperature, at which a saturated pattern still has a
    derivative: ``c_l = p (c_p - sum p c_p)`` with ``p = softmax(l / temperature)``.

    Attributes:
        temperature: divides the attention logits in the backward pass; 1 is the ordinary derivative.
    """

    temperature: float = 2.0

    @property
    def leaks(self) -> frozenset[str]:
        return super().leaks | {"activation"}

    def activation(self, slope: Slope, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Ordinary derivative."""
        return activate(slope, x)

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        """Values receive their half at temperature 1, queries and keys theirs at the higher temperature."""
        if self.temperature == 1:
            return super().attention(product, q, k, v)
        through_values = product(stop_gradient(q), stop_gradient(k), scale_cotangent(v, 0.5))
        # the derivative of softmax(l / temperature) has a factor 1 / temperature, which GIM leaves out
        share = 0.25 * self.temperature
        through_pattern = product(
            scale_cotangent(q, share), scale_cotangent(k, share), stop_gradient(v), temperature=self.temperature
        )
        return attach(through_values, through_pattern)
