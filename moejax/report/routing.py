"""The tables that ``moejax analyse`` prints, and the files that it writes."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from moejax.report.figure_file import save_figure
from moejax.report.plots.routing import KIND_NAMES, routing_figures
from moejax.report.schema import LayerEntry, ProbeEntry, RoutingReport
from moejax.report.visible import PlainTable, cell, visible
from moejax.writing import LOCK, locked, write_file

_TABLES = {
    "router": {
        "router_entropy": "entropy",
        "router_margin": "margin",
        "weight_entropy": "weight entropy",
        "weight_margin": "weight margin",
        "active_slots": "active slots",
        "router_similarity": "cosine of rows",
    },
    "experts": {
        "relative_perplexity": "perplexity / E",
        "jain_index": "Jain",
        "largest_load": "max load",
        "dead": "dead",
        "token_specialisation": "by token",
        "label_divergence": "by label",
        "expert_similarity": "cosine",
        "output_similarity": "output cosine",
    },
}
"""For each table in the terminal, the statistics of a layer that it shows, with their column names."""

_LAYER = 9
"""Width of the column of layers, with borders."""

_CAPTIONS = {
    "router": "entropies are divided by their largest value; -: no value",
    "experts": "perplexity and Jain index: 1 is an even usage; max load: busiest expert over the mean; "
    "dead: experts that no token selected; by ..: specialisation",
}


def routing_tables(report: RoutingReport, width: int | None = None) -> list[Table]:
    """Tables of the data, each kind of mixture, the comparison with another checkpoint, and the probes.

    Args:
        report: the dictionary of :meth:`moejax.study.Analysis.to_dict`.
        width: columns of the terminal; a table that is wider goes on below itself.
    """
    tables = [_data_table(report)]
    for kind, mixtures in report["mixtures"].items():
        for part in _TABLES:
            tables += _layers_tables(kind, part, mixtures["layers"], width)
    for kind, changes in (report["changes"] or {}).items():
        table = PlainTable(
            "layer",
            "set overlap",
            "switch rate",
            title=f"{KIND_NAMES[kind]}, against {visible(report['against'] or '')}",
        )
        for change in changes:
            table.add_row(str(change["layer"]), _number(change["overlap"]), _number(change["switch_rate"]))
        tables.append(table)
    return [*tables, *([_probes_table(report["probes"])] if report["probes"] else [])]


def write_routing(report: RoutingReport, folder: Path) -> list[Path]:
    """Write ``statistics.json`` (all statistics), ``layers.csv`` (numbers by layer) and the plots.

    Args:
        report: the dictionary of :meth:`moejax.study.Analysis.to_dict`.
        folder: where to write; it is made if it does not exist.

    Returns:
        The paths of the files.

    Raises:
        BusyError: another run is writing into the folder.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, folder):
        written = [folder / "statistics.json", folder / "layers.csv"]
        write_file(written[0], json.dumps(report, allow_nan=False))
        write_file(written[1], layers_csv(report))
        for name, figure in routing_figures(report).items():
            written.append(folder / f"{name}.png")
            save_figure(figure, written[-1])
    return written


def layers_csv(report: RoutingReport) -> str:
    """Comma-separated values: a row for each mixture, a column for each number; absent numbers are empty."""
    rows = [
        {"kind": kind} | {k: len(v) if isinstance(v, list) else v for k, v in layer.items() if _scalar(k, v)}
        for kind, mixtures in report["mixtures"].items()
        for layer in mixtures["layers"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _scalar(name: str, value: object) -> bool:
    """Return whether a statistic fits into one cell: it is one number, or the list of dead experts (counted)."""
    return name == "dead" or not isinstance(value, list)


def _data_table(report: RoutingReport) -> Table:
    table = PlainTable("data", "", title=visible(report["model"]))
    read, total = report["tokens"], report["tokens_of_data"]
    table.add_row("tokens", f"{read:,}" + (f" of {total:,}, drawn at random" if read < total else ""))
    table.add_row("window", f"{report['length']} tokens")
    table.add_row("loss", f"{_number(report['loss'])} nats a token, {report['predictions']:,} tokens predicted")
    for label, loss in zip(report["labels"], report["label_loss"], strict=True):
        table.add_row(f"  {visible(label)}", _number(loss))
    for kind, mixtures in report["mixtures"].items():
        layers = mixtures["layers"]
        sizes = ", ".join(sorted({f"{layer['slots']} of {layer['experts']}" for layer in layers}))
        table.add_row(KIND_NAMES[kind], f"{sizes}, in {len(layers)} layers")
        for layer in layers:
            if layer["nan_tokens"]:
                nan = f"{layer['nan_tokens']:,} of {layer['nan_tokens'] + layer['tokens']:,} tokens"
                table.add_row(
                    cell(f"NaN in layer {layer['layer']}", "red"), cell(f"in the router's output, {nan}", "red")
                )
    return table


def _layers_tables(kind: str, part: str, layers: Sequence[LayerEntry], width: int | None) -> list[Table]:
    rows: list[Mapping[str, object]] = [*layers]
    shown = {name: head for name, head in _TABLES[part].items() if any(row[name] is not None for row in rows)}
    # a column is as wide as its numbers and the longest word of its name, with a border and two spaces
    widths = {name: max(5, *map(len, head.split())) for name, head in shown.items()}
    groups: list[list[str]] = [[]]
    for name in shown:
        taken = _LAYER + sum(widths[other] + 3 for other in (*groups[-1], name))
        if width is not None and groups[-1] and taken > width:
            groups.append([])
        groups[-1].append(name)
    tables = []
    for group in groups:
        table = PlainTable(
            "layer", title=f"{KIND_NAMES[kind]}: {part}", caption=_CAPTIONS[part] if group is groups[-1] else ""
        )
        for name in group:
            table.add_column(shown[name], min_width=widths[name])
        for row in rows:
            table.add_row(str(row["layer"]), *(_number(row[name]) for name in group))
        tables.append(table)
    return tables


def _probes_table(probes: Sequence[ProbeEntry]) -> Table:
    title = f"loss with each token's best experts masked in all layers, {probes[0]['predictions']:,} tokens predicted"
    table = PlainTable("masked", "in their place", "loss (nats)", "increase", title=title)
    table.add_row("none", "", _number(probes[0]["intact"]), "")
    for probe in probes:
        loss, intact = probe["loss"], probe["intact"]
        increase = None if loss is None or intact is None else loss - intact
        instead = "the next best experts" if probe["refill"] else "the others, renormalised"
        table.add_row(str(probe["dropped"]), instead, _number(loss), _number(increase))
    return table


def _number(value: object) -> str:
    """A number with three decimals, the length of a list, or a dash for an absent number."""
    if value is None:
        return "-"
    return str(len(value)) if isinstance(value, list) else f"{value:.3f}"
