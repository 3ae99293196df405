"""The dictionary that ``Backtrace.run_task`` returns."""

from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.dlbacktrace.initial_relevance import GENERATION
from moejax.dlbacktrace.propagation import StepRelevance
from moejax.dlbacktrace.relevance_trace import RelevanceTrace
from moejax.dlbacktrace.tasks import TaskOutcome, TaskRequest, first_columns, layer_outputs
from moejax.lm import LM


def assemble(
    lm: LM, outcome: TaskOutcome, request: TaskRequest, keep: Callable[[StepRelevance], None]
) -> dict[str, Any]:
    """The results under DLBacktrace's names: ``task``, ``generated_ids``, and what is asked for.

    Args:
        keep: called with the relevance of each explained step, in order.
    """
    results: dict[str, Any] = {"task": request.initial.task, "generated_ids": outcome.ids}
    if request.initial.task != GENERATION:
        results["predictions"] = outcome.scores[0]
    if request.returned.scores:
        results["scores_trace"] = outcome.scores
    if request.returned.relevance:
        trace = RelevanceTrace(request.cache)
        for step, token, relevance in outcome.relevance:
            rescaled = relevance.rescaled(request.scaler, 0.0)
            keep(rescaled)
            trace.add(step, token, rescaled)
            results["relevance"] = rescaled.nodes
        results["relevance_trace"] = trace.entries
    if request.returned.layerwise_output:
        results["layerwise_output_trace"] = layerwise_outputs(lm, outcome)
    return results


def node_io(entering: dict[str, np.ndarray], leaving: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Values by node: ``input_values``, which sums do not have, and ``output_values``."""
    given = {name: {"input_values": entering[name]} if name in entering else {} for name in leaving}
    return {name: given[name] | {"output_values": value} for name, value in leaving.items()}


def layerwise_outputs(lm: LM, outcome: TaskOutcome) -> list[dict[str, dict[str, np.ndarray]]]:
    """The values of each step by node: ``all_in`` for what enters a node, ``all_out`` for what leaves it."""
    entering, leaving = layer_outputs(lm, outcome.read)
    return [{"all_in": first_columns(entering, n), "all_out": first_columns(leaving, n)} for n in outcome.columns]
