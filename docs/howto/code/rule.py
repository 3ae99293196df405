"""RelP (arXiv 2508.21258): AttnLRP whose attention keeps its ordinary derivative."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from moejax.rules import AttnLRP, register_rule
from moejax.rules.rule import AttentionProduct


@register_rule("relp", variants={"relp-uniform": {"router": "uniform"}})
@dataclass(frozen=True)
class RelP(AttnLRP):
    """Norms, gated units, clamps and routers as in AttnLRP; queries, keys and values receive their full cotangents.

    The leaks have the same names as in AttnLRP: ``softmax``, ``bias``, and ``router`` if the router does not conserve.
    The amount of ``softmax`` is another.
    """

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G C"],
    ) -> Float[Array, "B T H C"]:
        """Ordinary calculus: no factor at queries, keys and values."""
        return product(q, k, v)


if __name__ == "__main__":
    import moejax

    lm = moejax.load("tiny-olmoe", dtype="float32")
    prompt = "And the LORD said unto"
    relevance = moejax.explain(lm, prompt, rule="relp")
    print(relevance.ledger)
    # an operation that leaks and is not named in `leaks` would leave a residual
    assert abs(relevance.ledger.residual[0]) < 1e-5 * abs(relevance.ledger.target[0])
    # a rule never changes a value
    assert relevance.ledger.target[0] == moejax.explain(lm, prompt, rule="plain").ledger.target[0]
