"""Tables of what ``moejax analyse`` found, and the files that it writes."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from moejax.report.aggregate import visible
from moejax.report.routing_plots import routing_figures

Found = dict[str, Any]

_TABLES = {
    "router": {
        "router_entropy": "entropy",
        "router_margin": "margin",
        "weight_entropy": "weights' entropy",
        "weight_margin": "weights' margin",
        "active_slots": "active slots",
        "router_similarity": "rows' cosine",
    },
    "experts": {
        "relative_perplexity": "perplexity / E",
        "jain_index": "Jain",
        "largest_load": "load",
        "dead": "dead",
        "token_specialisation": "by token",
        "label_divergence": "by label",
        "expert_similarity": "cosine",
        "output_similarity": "outputs' cosine",
    },
}
"""Statistics of a layer that stand in the terminal, table by table, and their heads."""

_CAPTIONS = {
    "router": "entropies over their largest value; -: absent",
    "experts": "perplexity, Jain: 1 is even; load: the busiest, over an even share; by ..: specialisation",
}

_WORDS = {"feed_forward": "feed-forward experts", "attention": "attention experts"}


def routing_tables(found: Found) -> list[Table]:
    """What :meth:`moejax.study.Analysis.to_dict` says: the data, each kind of mixture, comparison and probes."""
    tables = [_data_table(found)]
    for kind, mixtures in found["mixtures"].items():
        tables += [_layers_table(kind, part, mixtures["layers"]) for part in _TABLES]
    for kind, changes in (found["changes"] or {}).items():
        table = Table("layer", "set overlap", "switch rate", title=f"{_WORDS[kind]}, against {_safe(found['against'])}")
        for change in changes:
            table.add_row(str(change["layer"]), _number(change["overlap"]), _number(change["switch_rate"]))
        tables.append(table)
    return [*tables, *([_probes_table(found["probes"])] if found["probes"] else [])]


def write_routing(found: Found, folder: Path) -> list[Path]:
    """Write ``statistics.json`` (everything), ``layers.csv`` (numbers by layer) and the plots; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "statistics.json", folder / "layers.csv"]
    written[0].write_text(json.dumps(found, allow_nan=False), "utf-8")
    written[1].write_text(layers_csv(found), "utf-8")
    for name, figure in routing_figures(found).items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1])
    return written


def layers_csv(found: Found) -> str:
    """A row for each mixture, a column for each number of it; what is absent is empty."""
    rows = [
        {"kind": kind} | {k: len(v) if k == "dead" and v is not None else v for k, v in layer.items() if _scalar(k, v)}
        for kind, mixtures in found["mixtures"].items()
        for layer in mixtures["layers"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _scalar(name: str, value: Any) -> bool:
    return name == "dead" or not isinstance(value, list)


def _data_table(found: Found) -> Table:
    table = Table("data", "", title=_safe(found["model"]))
    read, whole = found["tokens"], found["tokens_of_data"]
    table.add_row("tokens", f"{read:,}" + (f" of {whole:,}, drawn at random" if read < whole else ""))
    table.add_row("window", f"{found['length']} tokens")
    table.add_row("loss", f"{_number(found['loss'])} nats a token, {found['predictions']:,} predicted")
    for label, loss in zip(found["labels"], found["label_loss"], strict=True):
        table.add_row(f"  {_safe(label)}", _number(loss))
    for kind, mixtures in found["mixtures"].items():
        layers = mixtures["layers"]
        sizes = ", ".join(sorted({f"{layer['slots']} of {layer['experts']}" for layer in layers}))
        table.add_row(_WORDS[kind], f"{sizes}, in {len(layers)} layers")
        for layer in layers:
            if layer["nan_tokens"]:
                of = f"{layer['nan_tokens']:,} of {layer['nan_tokens'] + layer['tokens']:,} tokens"
                table.add_row(f"[red]NaN in layer {layer['layer']}[/red]", f"[red]the router's, at {of}[/red]")
    return table


def _layers_table(kind: str, part: str, layers: list[Found]) -> Table:
    shown = {name: head for name, head in _TABLES[part].items() if any(layer[name] is not None for layer in layers)}
    table = Table("layer", *shown.values(), title=f"{_WORDS[kind]}: {part}", caption=_CAPTIONS[part])
    for layer in layers:
        table.add_row(str(layer["layer"]), *(_number(layer[name]) for name in shown))
    return table


def _probes_table(probes: list[Found]) -> Table:
    title = f"best experts masked in all layers, {probes[0]['predictions']:,} tokens predicted"
    table = Table("masked", "then", "loss (nats)", "more", title=title)
    table.add_row("none", "", _number(probes[0]["intact"]), "")
    for probe in probes:
        loss, intact = probe["loss"], probe["intact"]
        more = None if loss is None or intact is None else loss - intact
        way = "the next best" if probe["refill"] else "the rest renormalised"
        table.add_row(str(probe["dropped"]), way, _number(loss), _number(more))
    return table


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return str(len(value)) if isinstance(value, list) else f"{value:.3f}"


def _safe(text: str) -> str:
    """A name from a file: without control characters, and with brackets that are no markup."""
    return escape(visible(text))
