"""A baseline that the package does not have: the length of each token's embedding."""

import numpy as np

from moejax import LM, Argmax, explain
from moejax.relevance import Scores, Target, register_baseline


@register_baseline("embedding-length")
def embedding_length(lm: LM, prompt: str | list[int], *, target: Target = Argmax()) -> Scores:
    """Score each token by the length of its embedding, whatever the target."""
    resolved = explain(lm, prompt, target=target)
    lengths = np.linalg.norm(np.asarray(lm.decoder.embedding, np.float32)[resolved.token_ids], axis=-1)
    return Scores(
        method="embedding length",
        unit="the stream's",
        labels=resolved.labels,
        positions=resolved.positions,
        token_ids=resolved.token_ids,
        pieces=resolved.pieces,
        tokens=np.broadcast_to(lengths, (len(resolved.labels), len(lengths))),
    )
