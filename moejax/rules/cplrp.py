"""CP-LRP: AttnLRP that holds the attention pattern constant (Ali et al., ICML 2022, arXiv 2202.07304)."""

from dataclasses import dataclass

from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.rules.attnlrp import AttnLRP
from moejax.rules.registry import register_rule
from moejax.rules.rule import AttentionProduct


@register_rule("cplrp")
@dataclass(frozen=True)
class CPLRP(AttnLRP):
    """AttnLRP with the attention pattern held constant: all relevance of a head flows to its values (conserves)."""

    @property
    def leaks(self) -> frozenset[str]:
        return super().leaks - {"softmax"}

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        return product(stop_gradient(q), stop_gradient(k), v)
