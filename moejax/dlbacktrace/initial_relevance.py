"""Where relevance starts: how much of it at which logit."""

from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.dlbacktrace.inputs import Batch, to_numpy
from moejax.errors import MoejaxError
from moejax.rules import Proportional, Rule, by_name

GENERATION = "generation"
CLASSIFICATION = ("binary-classification", "multi-class-classification")


def check_task(task: str) -> str:
    """The task, spelled as here.

    Raises:
        MoejaxError: there is none of that name.
    """
    found = task.replace(" ", "-").replace("_", "-")
    if found not in (GENERATION, *CLASSIFICATION):
        raise MoejaxError(f"task={task!r} is unknown; choose from {', '.join((GENERATION, *CLASSIFICATION))}.")
    return found


def rule_of(mode: Any) -> Rule:
    """The rule of a mode: ``"default"`` is DLBacktrace's, the others are named in ``moejax.rules.RULES``.

    Raises:
        MoejaxError: there is none of that name.
    """
    return Proportional() if mode == "default" else by_name(mode)


def start_weights(
    batch: Batch,
    logits: Float[np.ndarray, "B V"],
    *,
    task: str,
    multiplier: float | int,
    thresholding: float | int,
    predicted_token: Any = None,
) -> Float[np.ndarray, "B T V"]:
    """``multiplier`` at each row's last logits: on the given or best token, or in classification shared among tokens.

    In classification tasks all tokens more probable than ``thresholding`` take part, in proportion to their
    probability; if none is, the best one.

    Raises:
        MoejaxError: a predicted token beyond the vocabulary.
    """
    rows, vocabulary = logits.shape
    share = np.zeros((rows, vocabulary))
    if predicted_token is not None:
        chosen = np.broadcast_to(to_numpy(predicted_token).reshape(-1), rows)
        if not ((chosen >= 0) & (chosen < vocabulary)).all():
            raise MoejaxError(f"predicted_token={predicted_token} is outside the vocabulary of {vocabulary}.")
    else:
        chosen = logits.argmax(1)
        if check_task(task) != GENERATION:
            probability = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
            probability /= probability.sum(1, keepdims=True)
            share = np.where(probability > thresholding, probability, 0)
    found = share.any(1)
    share[~found, chosen[~found]] = 1
    share *= multiplier / share.sum(1, keepdims=True)
    weights = np.zeros((*batch.ids.shape, vocabulary), np.float32)
    last = batch.ids.shape[1] - 1 - np.argmax(batch.valid[:, ::-1], axis=1)
    weights[np.arange(rows), last] = share
    return weights
