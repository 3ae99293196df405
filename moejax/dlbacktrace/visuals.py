"""The pictures of :class:`~moejax.dlbacktrace.Backtrace`, which returns a figure where DLBacktrace shows a window."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.dlbacktrace import figures, nodes
from moejax.dlbacktrace.inputs import to_numpy
from moejax.lm import LM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trace = Sequence[dict[str, Any]]


class Visuals:
    """Pictures of what was computed last, or of a trace.

    Attributes:
        all_wt: relevance of the last explained step at each node.
        model_resource: the nodes and their graph.
    """

    all_wt: dict[str, np.ndarray]
    model_resource: dict[str, Any]
    _generated: np.ndarray | None

    def _need_lm(self) -> LM:
        raise NotImplementedError

    def visualize_tokenwise_relevance_map(
        self,
        trace: Trace | None = None,
        input_ids: Any = None,
        tokenizer: Any = None,
        *,
        generated_ids: Any = None,
        input_key: str = nodes.EMBEDDINGS,
        figsize: figures.Size = (12, 6),
        row: int = 0,
        timewise_relevance_out: Trace | None = None,
    ) -> "Figure":
        """A figure of every token's relevance (vertical) for every explained step (horizontal), for one prompt.

        Args:
            trace: the ``relevance_trace`` of a run.
            input_ids: token ids of the prompts, as they were given.
            tokenizer: names the tokens; by default the model's tokenizer.
            generated_ids: ids of prompts and answers, which name the tokens of steps that were not explained; by
                default the ids of the last run.
            input_key: the node whose relevance is shown.
            figsize: width and height in inches.
            row: index of the prompt or answer in the batch.
            timewise_relevance_out: another name of ``trace``.

        Raises:
            TypeError: no trace, or no ``input_ids``.
            MoejaxError: an empty trace, a trace that holds sums only, or an unknown node.
        """
        trace = _given(trace, timewise_relevance_out)
        axes = self._axes(trace, input_ids, generated_ids, row, tokenizer)
        return figures.token_map(trace, axes, input_key, figsize)

    def visualize_input_heatmap_for_token(
        self,
        trace: Trace | None = None,
        n: int = 0,
        input_ids: Any = None,
        tokenizer: Any = None,
        *,
        generated_ids: Any = None,
        input_key: str = nodes.EMBEDDINGS,
        figsize: figures.Size = (12, 3),
        row: int = 0,
        timewise_relevance_out: Trace | None = None,
    ) -> "Figure":
        """A figure of every token's relevance for step ``n``, counted from 0.

        Other parameters are as in :meth:`visualize_tokenwise_relevance_map`.

        Raises:
            TypeError: no trace, or no ``input_ids``.
            MoejaxError: a step that was not explained, a trace that holds sums only, or an unknown node.
        """
        trace = _given(trace, timewise_relevance_out)
        axes = self._axes(trace, input_ids, generated_ids, row, tokenizer)
        return figures.token_bar(trace, n, axes, input_key, figsize)

    def visualize_dlbacktrace(
        self,
        output_path: str | Path | None = None,
        top_k: int | None = None,
        relevance_threshold: float | int | None = None,
        engine_auto_threshold: int = 1500,
    ) -> "Figure":
        """A figure of the model's nodes, each with its sum of absolute relevance at the last explained step.

        Args:
            output_path: a file to which the figure is saved too, as SVG unless its suffix says otherwise.
            top_k: show this many nodes only, those with the largest sums.
            relevance_threshold: show nodes with at least this sum only.
            engine_auto_threshold: more nodes than this are drawn as colours without text, which is fast.

        Raises:
            MoejaxError: nothing was explained yet, or no node has enough relevance.
        """
        graph = self.model_resource["graph"]
        return figures.node_graph(self.all_wt, graph, output_path, top_k, relevance_threshold, engine_auto_threshold)

    def visualize(self, save_path: str | Path | None = None) -> "Figure":
        """A figure of the model's nodes, without relevance.

        Args:
            save_path: a file to which the figure is saved too, as SVG unless its suffix says otherwise.
        """
        return figures.plain_graph(self.model_resource["graph"], self.model_resource["layers"], save_path)

    def _axes(self, trace: Trace, input_ids: Any, generated_ids: Any, row: int, tokenizer: Any) -> figures.TokenAxes:
        """Names of the tokens; without ``generated_ids``, the last run's are used if it had the same prompt."""
        if input_ids is None:
            raise TypeError("input_ids are missing: the token ids of the prompts, as they were given.")
        ids = np.atleast_2d(to_numpy(input_ids))
        if generated_ids is None:
            generated_ids = figures.continuation(self._generated, ids, row)
        return figures.TokenAxes(trace, ids, generated_ids, row, tokenizer, self._need_lm())


def _given(trace: Trace | None, other: Trace | None) -> Trace:
    found = other if trace is None else trace
    if found is None:
        raise TypeError("the trace is missing: the relevance_trace of a run.")
    return found
