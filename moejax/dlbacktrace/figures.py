"""Figures of a trace: the tokens on the axes and the numbers between them. Drawing one imports Matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from moejax.dlbacktrace.inputs import pieces, to_numpy
from moejax.dlbacktrace.relevance_trace import TraceEntry, all_wt
from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.report import backtrace as report
from moejax.report import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Size = tuple[float | int, float | int]
"""Width and height in inches."""


def continuation(generated: np.ndarray | None, prompts: np.ndarray, row: int) -> np.ndarray | None:
    """``generated`` (ids of prompts and answers) if its ``row`` begins with that row of ``prompts``, else ``None``."""
    if generated is None or row >= min(len(prompts), len(generated)):
        return None
    return generated if np.array_equal(generated[row, : prompts.shape[1]], prompts[row]) else None


class TokenAxes:
    """Names of the tokens of one row: the prompt's, and behind them the generated ones, one for each step."""

    def __init__(
        self, trace: Sequence[TraceEntry], input_ids: Any, generated_ids: Any, row: int, tokenizer: Any, lm: LM
    ) -> None:
        ids = np.atleast_2d(to_numpy(input_ids))[row].tolist()
        self.prompt, self._tokenizer, self._lm, self._row = len(ids), tokenizer, lm, row
        self._ids = dict(enumerate(ids))
        if generated_ids is not None:
            self._ids |= dict(enumerate(np.atleast_2d(to_numpy(generated_ids))[row].tolist()))
        for entry in trace:
            self._ids[self.prompt + entry["step_index"]] = int(np.atleast_1d(entry["token_id"])[row])

    def name(self, column: int) -> str:
        """Text of the token in a column; ``"?"`` if it is unknown, as a step's that was not explained may be."""
        return pieces([self._ids[column]], self._tokenizer, self._lm)[0] if column in self._ids else "?"

    def step(self, entry: TraceEntry) -> str:
        """A step's number and the text of its token."""
        return f"{entry['step_index']}: {self.name(self.prompt + entry['step_index'])}"

    def scores(self, entry: TraceEntry, node: str) -> Float[np.ndarray, " T"]:
        """Relevance of each token at a node.

        Raises:
            MoejaxError: an unknown node, or an entry that holds sums only.
        """
        nodes = all_wt(entry)
        if node not in nodes:
            raise MoejaxError(f"input_key={node!r} is not a node; choose from {', '.join(nodes)}.")
        return nodes[node][self._row].sum(-1, dtype=np.float64)


def token_map(trace: Sequence[TraceEntry], axes: TokenAxes, node: str, figsize: Size) -> "Figure":
    """A figure of the relevance of every token for every explained step.

    Raises:
        MoejaxError: no step was explained, or an unknown node.
    """
    if not trace:
        raise MoejaxError("the trace is empty: run with return_relevance=True, and explain at least one step.")
    columns = [axes.scores(entry, node) for entry in trace]
    tokens = [axes.name(i) for i in range(max(map(len, columns)))]
    return report.token_map(columns, tokens, [axes.step(entry) for entry in trace], axes.prompt, figsize)


def token_bar(trace: Sequence[TraceEntry], step: int, axes: TokenAxes, node: str, figsize: Size) -> "Figure":
    """A figure of the relevance of every token for one step.

    Raises:
        MoejaxError: a step that was not explained, or an unknown node.
    """
    entry = next((entry for entry in trace if entry["step_index"] == step), None)
    if entry is None:
        explained = ", ".join(str(entry["step_index"]) for entry in trace) or "none"
        raise MoejaxError(f"step {step} is not in the trace; explained are {explained}.")
    scores = axes.scores(entry, node)
    return report.token_heatmap(scores, [axes.name(i) for i in range(len(scores))], axes.step(entry), figsize)


def node_graph(
    nodes: Mapping[str, np.ndarray],
    graph: Mapping[str, Any],
    path: str | Path | None,
    top_k: int | None,
    threshold: float | int | None,
    most_with_text: int,
) -> "Figure":
    """A figure of the model's nodes, each with its sum of absolute relevance.

    Args:
        path, top_k, threshold, most_with_text: the parameters ``output_path``, ``top_k``, ``relevance_threshold`` and
            ``engine_auto_threshold`` of ``Backtrace.visualize_dlbacktrace``.

    Raises:
        MoejaxError: nothing was explained, or no node has enough relevance.
    """
    if not nodes:
        raise MoejaxError("nothing was explained yet: call run_task with return_relevance=True, or eval.")
    sums = {name: float(np.abs(x).sum(dtype=np.float64)) for name, x in nodes.items()}
    least = max(sums.values()) if top_k is not None and top_k < 1 else 0.0
    if top_k is not None and top_k >= 1:
        least = sorted(sums.values(), reverse=True)[min(top_k, len(sums)) - 1]
    shown = {name: value for name, value in sums.items() if value >= max(least, threshold or 0.0)}
    if not shown:
        raise MoejaxError(f"no node has relevance_threshold={threshold}; the most is {max(sums.values()):.4g}.")
    figure = report.node_graph(shown, graph, title="sum |R| of each node", with_text=len(shown) <= most_with_text)
    return _saved(figure, path)


def plain_graph(graph: Mapping[str, Any], stack: Sequence[str], path: str | Path | None) -> "Figure":
    """A figure of the model's nodes alone; ``path`` as in :func:`node_graph`."""
    return _saved(report.node_graph(dict.fromkeys(stack), graph, title="nodes"), path)


def _saved(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        path = Path(path)
        save_figure(figure, path if path.suffix else path.with_suffix(".svg"))
    return figure
