"""An explanation in the terminal."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moejax.report import aggregate, colours
from moejax.report.aggregate import ExpertUse
from moejax.report.schema import RelevanceReport, TargetEntry
from moejax.report.visible import escaped

_LEGEND_STEPS = 21
_STRONGEST = 5
_WIDE = 10_000


def render(report: RelevanceReport, console: Console | None = None, top: int = 3, scale: str = "linear") -> None:
    """Print an explanation: coloured tokens, next-token candidates, the top experts of each layer and the ledger.

    On a console without colour, the signed relevance follows every token.

    Args:
        report: the dictionary of ``Relevance.to_dict()``.
        console: where to print; by default standard output.
        top: number of experts to list for each layer.
        scale: how colours grow with relevance: ``"linear"`` or ``"sqrt"``.

    Raises:
        ValueError: the arrays of the report do not fit together.
        MoejaxError: there is no such scale.
    """
    aggregate.check(report)
    colours.check_scale(scale)
    console = console or Console()
    targets = report["targets"]
    # a pipe gets every text in one line: whoever reads it knows better where to break
    piped = not console.is_terminal
    console.print(_text(console, f"{report['model']}  {report['rule']}", "bold"), soft_wrap=piped)
    for index, target in enumerate(targets):
        console.print()
        console.print(_header(console, report, index), soft_wrap=True)
        console.print(_tokens(console, report, target, scale), soft_wrap=piped)
        console.print(_legend(console, target, scale), soft_wrap=piped)
        console.print(_strongest(console, report, target), soft_wrap=True)
        console.print(_candidates(console, target), soft_wrap=True)
        if report["num_experts"]:
            about = ["relevance, share of the layer,", "tokens routed"]
            console.print(_labelled(console, "top experts per layer", about, gap=" "), soft_wrap=True)
            table = _experts(report, index, top, scale)
            fits = console.measure(table, options=console.options.update(width=_WIDE)).maximum <= console.width
            console.print(table if fits else _experts(report, index, top, scale, stacked=True))
        # no wrapping: a pipe gets the equation in one line, and a terminal folds it by itself
        console.print(_text(console, aggregate.summary_line(report, index)), soft_wrap=True)


def _header(console: Console, report: RelevanceReport, index: int) -> Text:
    target, total = report["targets"][index], len(report["targets"])
    count = f"target {index + 1}/{total}" if total > 1 else "target"
    after = aggregate.quoted(report["tokens"][target["position"]])
    label = _text(console, aggregate.visible(target["label"]), "bold")
    where = [f"{target['value']:.3f}", f"predicted at position {target['position']},", f"after {after}"]
    return _flow(console, [_text(console, count), label, *(_text(console, part) for part in where)])


def _tokens(console: Console, report: RelevanceReport, target: TargetEntry, scale: str) -> Text:
    values = aggregate.floats(target["tokens"])
    largest = aggregate.scale_of(values)
    plain = not _has_colour(console)
    flow = Text()
    for token, value in zip(report["tokens"], values, strict=True):
        flow.append_text(_text(console, aggregate.visible(token), _style(value, largest, scale)))
        if plain:
            flow.append(f"[{value:+.2g}]")
        flow.append("\n" * token.count("\n"))
    return flow


def _legend(console: Console, target: TargetEntry, scale: str) -> Text:
    largest = aggregate.scale_of(aggregate.floats(target["tokens"]))
    if not _has_colour(console):
        return Text(f"[signed relevance of each token, largest magnitude {largest:.3g}]")
    legend = Text(f"{-largest:+.3g} ")
    for value in np.linspace(-largest, largest, _LEGEND_STEPS):
        legend.append(" ", _style(float(value), largest, scale))
    return legend.append(f" {largest:+.3g}")


def _strongest(console: Console, report: RelevanceReport, target: TargetEntry) -> Text:
    values = aggregate.floats(target["tokens"])
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:_STRONGEST]
    parts = [f"{aggregate.quoted(report['tokens'][t])}@{t} {values[t]:+.3g}" for t in order if values[t]]
    return _labelled(console, "strongest tokens", parts or ["none, every relevance is zero"])


def _candidates(console: Console, target: TargetEntry) -> Text:
    parts = [f"{aggregate.quoted(c['token'])} {c['probability']:.1%}" for c in target["candidates"]]
    return _labelled(console, "next token", parts or ["no candidates"])


def _experts(report: RelevanceReport, index: int, top: int, scale: str, stacked: bool = False) -> Table:
    """The top experts of each layer: side by side, or below each other for a narrow console."""
    layers = aggregate.top_experts(report, index, top)
    largest = aggregate.scale_of(aggregate.expert_map(report, index))
    # numbers of one kind have one width, so that columns align
    uses = [use for layer in layers for use in layer]
    id_width = max((len(str(use.expert)) for use in uses), default=1)
    count_width = max((len(str(use.tokens)) for use in uses), default=1)
    number_width = max((len(f"{use.relevance:+.3g}") for use in uses), default=1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    ranks = max((len(layer) for layer in layers), default=0)
    for name in [f"#1 to #{ranks}"] if stacked else [f"#{rank + 1}" for rank in range(ranks)]:
        table.add_column(name, no_wrap=True)
    for number, layer in enumerate(layers):
        cells = [
            _expert_cell(use, _style(use.relevance, largest, scale), id_width, number_width, count_width)
            for use in layer
        ]
        table.add_row(Text(str(number)), *([Text("\n").join(cells)] if stacked else cells))
    return table


def _expert_cell(use: ExpertUse, style: Style, id_width: int, number_width: int, count_width: int) -> Text:
    cell = Text(f"E{use.expert:<{id_width}} ")
    cell.append(f"{f'{use.relevance:+.3g}':>{number_width}}", style)
    return cell.append(f" {use.share:4.0%} {use.tokens:>{count_width}}t")


def _labelled(console: Console, label: str, parts: list[str], gap: str = "  ") -> Text:
    """Parts behind a label."""
    first, *rest = (_text(console, part) for part in parts)
    return _flow(console, [_text(console, f"{label}: ", "bold").append_text(first), *rest], gap)


def _flow(console: Console, parts: list[Text], gap: str = "  ") -> Text:
    """Parts in a line; on a terminal lines break between parts, as within one there is a token or its number."""
    line, width = Text(), 0
    for number, part in enumerate(parts):
        if number and console.is_terminal and width + len(gap) + part.cell_len > console.width:
            line.append("\n")
            width = 0
        elif number:
            line.append(gap)
            width += len(gap)
        line.append_text(part)
        width += part.cell_len
    return line


def _style(value: float, largest: float, scale: str) -> Style:
    if scale == "sqrt":
        value, largest = float(colours.signed_root(value)), largest**0.5
    # set both colours, so that the text is readable on dark and light terminals
    background = colours.diverging(value, largest)
    return Style(color=Color.from_rgb(*colours.ink(background)), bgcolor=Color.from_rgb(*background))


def _text(console: Console, content: str, style: str | Style = "") -> Text:
    """Text that cannot act and is not parsed as markup, with characters escaped that the console's encoding lacks."""
    text = Text(escaped(content).encode(console.encoding, "backslashreplace").decode(console.encoding))
    text.stylize(style)
    return text


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
