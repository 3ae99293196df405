"""Relevance of one step from its values, as ``Backtrace.eval`` has it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.dlbacktrace.initial_relevance import InitialRelevance
from moejax.dlbacktrace.inputs import EncodedInputs, read_inputs, to_numpy
from moejax.dlbacktrace.nodes import EMBEDDINGS, HEAD
from moejax.dlbacktrace.propagation import PropagationRun, StepRelevance, relevance_of_logits
from moejax.dlbacktrace.tasks import last_logits
from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.rules import Rule


def last_step(values: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The values of one step: of the last step, if ``values`` has several by their numbers."""
    values = values or {}
    return values[max(values, key=int)] if values and all(name.isdecimal() for name in values) else values


def check_token_ids(all_in: Mapping[str, Any]) -> None:
    """Refuse values that hold no token ids.

    Raises:
        MoejaxError: there is no entry for the embeddings.
    """
    if EMBEDDINGS not in all_in:
        raise MoejaxError(f"all_in has no token ids at {EMBEDDINGS!r}: pass what compute_outputs returned.")


def evaluate(
    lm: LM,
    all_in: Mapping[str, Any],
    all_out: Mapping[str, Any],
    rule: Rule,
    initial: InitialRelevance,
    start_wt: Any,
    predicted_token: Any,
) -> StepRelevance:
    """Relevance at every node of one step.

    Args:
        all_in, all_out: what enters and what leaves the nodes at this step.
        start_wt: relevance of each logit to start from; empty takes ``initial``.
        predicted_token: the token to start from; by default the best one.

    Raises:
        MoejaxError: logits of another model, or initial relevance of another shape.
    """
    inputs = read_inputs((all_in[EMBEDDINGS], all_in.get("attention_mask")), None, lm)
    logits = _at_last_token(inputs, to_numpy(all_out[HEAD])) if HEAD in all_out else None
    weights = to_numpy(start_wt).astype(np.float32)
    if weights.size == 0:
        given = last_logits(lm, inputs) if logits is None else logits
        weights = initial.at_last_logits(inputs, given, predicted_token)
    weights = weights[None] if weights.ndim == 2 else weights
    run = PropagationRun(lm, rule, inputs, inputs.ids.shape[1])
    relevance, computed_logits = relevance_of_logits(run, weights)
    _check_logits(logits, computed_logits, weights)
    return relevance


def _at_last_token(inputs: EncodedInputs, values: Float[np.ndarray, "B T V"]) -> Float[np.ndarray, "B V"]:
    """Values at the last token of each row."""
    return values[np.arange(len(values)), inputs.last_columns()]


def _check_logits(
    given: Float[np.ndarray, "B V"] | None, computed: Float[np.ndarray, "B V"], initial: Float[np.ndarray, "B T V"]
) -> None:
    """Refuse values of another model or of other inputs.

    Raises:
        MoejaxError: the logits differ by more than rounding.
    """
    # the computed logits are those at the last column with initial relevance: compare only if it is every row's last
    if given is None or not initial[:, -1].any(1).all():
        return
    if given.shape != computed.shape or np.abs(given - computed).max() > 0.05 * np.abs(computed).max():
        raise MoejaxError("all_out holds other logits than this model gives for all_in: they are not of one step.")
