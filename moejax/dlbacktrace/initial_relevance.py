"""The relevance that a task starts from: how much of it lies at which logit, and the rule that propagates it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.dlbacktrace.inputs import EncodedInputs, to_numpy
from moejax.errors import MoejaxError
from moejax.rules import Proportional, Rule, by_name

GENERATION = "generation"
CLASSIFICATION = ("binary-classification", "multi-class-classification")


def check_task(task: str) -> str:
    """The task's name, with hyphens; ``"auto"`` is generation, as these models generate.

    Raises:
        MoejaxError: an unknown task.
    """
    name = task.replace(" ", "-").replace("_", "-")
    if name == "auto":
        return GENERATION
    if name not in (GENERATION, *CLASSIFICATION):
        raise MoejaxError(f"task={task!r} is unknown; choose from {', '.join((GENERATION, *CLASSIFICATION))}.")
    return name


def find_rule(mode: Any) -> Rule:
    """The rule of a mode: ``"default"`` is DLBacktrace's proportional rule; others are named in ``moejax.rules.RULES``.

    Raises:
        MoejaxError: an unknown rule.
    """
    return Proportional() if mode == "default" else by_name(mode)


@dataclass(frozen=True)
class InitialRelevance:
    """How much relevance starts at which logit.

    Attributes:
        task: ``"generation"`` starts from one token; the classification tasks start from all tokens that are more
            probable than ``thresholding``, in proportion to their probability, or from the best token if no token is.
        multiplier: relevance at the start, in all.
        thresholding: a probability, read in the classification tasks only.
    """

    task: str = GENERATION
    multiplier: float | int = 100.0
    thresholding: float | int = 0.5

    def at_last_logits(
        self, inputs: EncodedInputs, logits: Float[np.ndarray, "B V"], predicted_token: Any = None
    ) -> Float[np.ndarray, "B T V"]:
        """Initial relevance at the logits behind the last token of each row; zero at all other columns.

        Args:
            logits: the logits behind the last token of each row.
            predicted_token: the token to start from, whatever the task; by default the best one.

        Raises:
            MoejaxError: a predicted token outside the vocabulary.
        """
        rows, vocabulary = logits.shape
        fractions = np.zeros((rows, vocabulary))
        if predicted_token is not None:
            chosen = np.broadcast_to(to_numpy(predicted_token).reshape(-1), rows)
            if not ((chosen >= 0) & (chosen < vocabulary)).all():
                raise MoejaxError(f"predicted_token={predicted_token} is outside the vocabulary of {vocabulary}.")
        else:
            chosen = logits.argmax(1)
            if self.task != GENERATION:
                probability = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
                probability /= probability.sum(1, keepdims=True)
                fractions = np.where(probability > self.thresholding, probability, 0)
        is_set = fractions.any(1)
        fractions[~is_set, chosen[~is_set]] = 1
        fractions *= self.multiplier / fractions.sum(1, keepdims=True)
        relevance = np.zeros((*inputs.ids.shape, vocabulary), np.float32)
        relevance[np.arange(rows), inputs.last_columns()] = fractions
        return relevance
