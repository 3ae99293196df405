"""GIM, gradient interaction modifications (Edin et al., arXiv 2505.17630)."""

from dataclasses import dataclass

from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.rules.attnlrp import AttnLRP
from moejax.rules.primitives import attach, scale_cotangent
from moejax.rules.rule import AttentionProduct, Slope, activate


@dataclass(frozen=True)
class GIM(AttnLRP):
    """Frozen norms and halved products as in AttnLRP, and the activation's own derivative.

    The softmax's derivative is taken at a higher ``temperature``, where a saturated pattern still has one:
    ``c_l = p (c_p - sum p c_p)`` with ``p = softmax(l / temperature)``.
    """

    temperature: float = 2.0

    @property
    def leaks(self) -> frozenset[str]:
        return super().leaks | {"activation"}

    def activation(self, slope: Slope, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return activate(slope, x)

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G C"],
    ) -> Float[Array, "B T H C"]:
        if self.temperature == 1:
            return super().attention(product, q, k, v)
        through_values = product(stop_gradient(q), stop_gradient(k), scale_cotangent(v, 0.5))
        # the derivative of softmax(l / temperature) has a factor 1 / temperature, which is not wanted
        share = 0.25 * self.temperature
        through_pattern = product(
            scale_cotangent(q, share), scale_cotangent(k, share), stop_gradient(v), temperature=self.temperature
        )
        return attach(through_values, through_pattern)
