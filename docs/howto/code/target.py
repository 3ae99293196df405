"""Two targets: a contrast of two sets of tokens, and a direction of the residual stream averaged over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax import LM, PromptError
from moejax.models import Decoder, Hidden
from moejax.relevance import Target, register_target
from moejax.relevance.seeds import TargetValues
from moejax.relevance.targets import TargetTerms
from moejax.rules import Reading


@register_target("set-contrast")
@dataclass(frozen=True)
class SetContrast(Target):
    """The mean logit of some tokens minus the mean logit of others, at the last position."""

    tokens: tuple[str, ...]
    others: tuple[str, ...]

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        """The prompt as it is, and one target: pairs of token id and factor."""
        if not self.tokens or not self.others:
            raise PromptError("a contrast of sets needs a token on both sides.")
        tokenizer = lm.need_tokenizer()
        terms = [(tokenizer.token_id(token), 1 / len(self.tokens)) for token in self.tokens]
        terms += [(tokenizer.token_id(token), -1 / len(self.others)) for token in self.others]
        return prompt, [TargetTerms(position=len(prompt) - 1, terms=tuple(terms))]


@register_target("mean-direction")
@dataclass(frozen=True, eq=False)
class MeanDirection(Target):
    """The residual stream that a layer reads, along a vector [D], averaged over the tokens of the prompt."""

    vector: Any
    layer: int

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        """The prompt as it is, and one target without logits."""
        if np.shape(self.vector) != (lm.config.model_dim,) or not 0 <= self.layer < lm.config.num_layers:
            raise PromptError(f"a direction of shape {np.shape(self.vector)} at layer {self.layer} does not fit.")
        return prompt, [TargetTerms(position=len(prompt) - 1, terms=())]

    def seeds(self, rows: list[list[TargetTerms]], dtype: Any) -> "MeanSeeds":
        """The targets of B sequences as arrays."""
        last = jnp.asarray([[target.position for target in targets] for targets in rows], jnp.int32)
        vectors = jnp.broadcast_to(jnp.asarray(self.vector, dtype), (*last.shape, np.size(self.vector)))
        return MeanSeeds(last, vectors, self.layer)

    def label(self, lm: LM, terms: TargetTerms, ids: np.ndarray | Sequence[int]) -> str:
        """The target's name in tables and pictures."""
        return f"mean of stream {self.layer} along a direction"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanSeeds:
    """What the engine differentiates: a function of the forward pass that is linear in what it reads.

    A pytree; the first two axes of every leaf are B and N.
    """

    last: Int[Array, "B N"]
    vectors: Float[Array, "B N D"]
    layer: int = field(metadata={"static": True})

    @property
    def num_targets(self) -> int:
        """N, the targets of a sequence."""
        return self.last.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        """The targets' values; ``hidden`` is the whole forward pass, ``reading`` its gates and rule."""
        layer = reading.for_layer(self.layer)
        stream = layer.gate("tokens", hidden.entering[self.layer])
        # sequences are padded behind their ends: only tokens up to the last position count
        counts = jnp.arange(stream.shape[1]) <= self.last[..., None]
        weights = counts / counts.sum(-1, keepdims=True)
        target = jnp.einsum("bnt,btd,bnd->bn", weights, stream.astype(self.vectors.dtype), self.vectors)
        last = jnp.take_along_axis(hidden.stream, self.last[..., None], axis=1)
        ids = jnp.zeros((*self.last.shape, 0), jnp.int32)
        return TargetValues(target, ids, jax.lax.stop_gradient(decoder.logits(last)))


if __name__ == "__main__":
    import moejax

    lm = moejax.load("tiny-olmoe", dtype="float32")
    prompt = "And the LORD said unto"
    for target in (
        SetContrast((" Moses", " David"), (" him", " them")),
        MeanDirection(lm.decoder.embedding[7], layer=2),
    ):
        relevance = moejax.explain(lm, prompt, target=target)
        print(relevance.labels[0], relevance.tokens[0].round(3))
        assert abs(relevance.ledger.residual[0]) < 1e-5 * max(1.0, abs(relevance.ledger.target[0]))
