"""The scores of a baseline as text."""

from rich.console import Console

from moejax.report.schema import ScoresReport
from moejax.report.visible import PlainTable, escaped


def render_scores(report: ScoresReport, top: int = 8) -> None:
    """Print what a method says of each target: the score of every token, and the experts with the largest scores."""
    console = Console()
    for index, target in enumerate(report["targets"]):
        gap = "" if target["gap"] is None else f"; not accounted for: {target['gap']:.3g}"
        title = f"{report['method']} of {target['label']}, in {report['unit']}{gap}"
        console.print(escaped(title), markup=False, highlight=False, soft_wrap=not console.is_terminal)
        if target["tokens"] is not None:
            table = PlainTable("token", "score")
            for piece, score in zip(report["tokens"], target["tokens"], strict=True):
                table.add_row(repr(piece), f"{score:.4f}")
            console.print(table)
        if target["experts"] is not None:
            table = PlainTable("layer", "expert", "score", title="experts, over all tokens")
            rows = [(layer, e, s) for layer, scores in enumerate(target["experts"]) for e, s in enumerate(scores)]
            for layer, expert, score in sorted(rows, key=lambda row: -abs(row[2]))[:top]:
                table.add_row(str(layer), str(expert), f"{score:.4f}")
            console.print(table)
        if index + 1 < len(report["targets"]):
            console.print()
