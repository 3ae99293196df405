"""A look at what was generated: tokens that were chosen from NaN mean nothing, and are an error."""

from typing import Any

import numpy as np

from moejax.errors import MoejaxError
from moejax.generation.step import Generation
from moejax.models import Decoder, FlatDecoder
from moejax.models.finite import first_not_finite
from moejax.rules import Reading


def check_finite(
    weights: Decoder | FlatDecoder, found: Generation, tokens: Any, valid: Any, reading: Reading, name: str
) -> None:
    """Raise if a token was chosen from logits that are not finite; then the pass is run again to say where that begins.

    Args:
        weights: the model.
        found: what was generated.
        tokens, valid: the padded prompts ``[B T]``.
        reading: gates and edits of the generation.
        name: what messages call the model.

    Raises:
        MoejaxError: the largest logit of a step was NaN or infinite.
    """
    # over several processes a part of the answers lies elsewhere
    if found.finite is None or not found.finite.is_fully_addressable or np.asarray(found.finite).all():
        return
    prompts, room = len(tokens), found.tokens.shape[1]
    answers = np.asarray(found.tokens).reshape(prompts, -1, room)[:, 0]
    within = np.arange(room) < np.asarray(found.lengths).reshape(prompts, -1)[:, :1]
    both = np.concatenate([np.asarray(tokens), answers], 1), np.concatenate([np.asarray(valid), within], 1)
    where = first_not_finite(weights, *both, reading.gates, reading.edits)
    rows = ", ".join(map(str, np.flatnonzero(~np.asarray(found.finite))[:5]))
    raise MoejaxError(f"{name}: the logits of prompt {rows} are not finite, so no token can be chosen; {where}.")
