"""From a trace to figures: which tokens stand on the axes, and the numbers between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from moejax.dlbacktrace.inputs import pieces, to_numpy
from moejax.dlbacktrace.trace import Entry, all_wt
from moejax.errors import MoejaxError
from moejax.lm import LM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Size = tuple[float | int, float | int]
"""Width and height in inches."""


class TokenAxes:
    """Names of the tokens of one row: those of the prompt, then those generated, a step each."""

    def __init__(
        self, trace: Sequence[Entry], input_ids: Any, generated_ids: Any, row: int, tokenizer: Any, lm: LM
    ) -> None:
        ids = np.atleast_2d(to_numpy(input_ids))[row].tolist()
        self.prompt, self._tokenizer, self._lm, self._row = len(ids), tokenizer, lm, row
        self._ids = dict(enumerate(ids))
        if generated_ids is not None:
            self._ids |= dict(enumerate(np.atleast_2d(to_numpy(generated_ids))[row].tolist()))
        for entry in trace:
            self._ids[self.prompt + entry["step_index"]] = int(np.atleast_1d(entry["token_id"])[row])

    def name(self, column: int) -> str:
        """The text of the token in a column; a step that was not explained may have none."""
        return pieces([self._ids[column]], self._tokenizer, self._lm)[0] if column in self._ids else "?"

    def step(self, entry: Entry) -> str:
        """A step's number and its token."""
        return f"{entry['step_index']}: {self.name(self.prompt + entry['step_index'])}"

    def scores(self, entry: Entry, node: str) -> Float[np.ndarray, " T"]:
        """Relevance of each token at a node.

        Raises:
            MoejaxError: there is no such node, or only sums were kept.
        """
        nodes = all_wt(entry)
        if node not in nodes:
            raise MoejaxError(f"input_key={node!r} is no node; choose from {', '.join(nodes)}.")
        return nodes[node][self._row].sum(-1, dtype=np.float64)


def token_map(trace: Sequence[Entry], axes: TokenAxes, node: str, figsize: Size) -> "Figure":
    """Relevance of every token for every explained step.

    Raises:
        MoejaxError: no step was explained, or there is no such node.
    """
    from moejax.report import backtrace as report

    if not trace:
        raise MoejaxError("the trace is empty: run with return_relevance=True, and explain at least one step.")
    columns = [axes.scores(entry, node) for entry in trace]
    tokens = [axes.name(i) for i in range(max(map(len, columns)))]
    return report.token_map(columns, tokens, [axes.step(entry) for entry in trace], axes.prompt, figsize)


def token_bar(trace: Sequence[Entry], step: int, axes: TokenAxes, node: str, figsize: Size) -> "Figure":
    """Relevance of every token for one step.

    Raises:
        MoejaxError: that step was not explained, or there is no such node.
    """
    from moejax.report import backtrace as report

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
    """The model's nodes with the sum of absolute relevance of each; options as in ``visualize_dlbacktrace``.

    Raises:
        MoejaxError: there is no relevance, or none of the nodes has enough.
    """
    from moejax.report import backtrace as report

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
    if path is not None:
        path = Path(path)
        figure.savefig(path if path.suffix else path.with_suffix(".svg"))
    return figure
