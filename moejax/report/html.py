"""An explanation as one self-contained HTML page, which needs no network, server or library.

The folder ``page/`` has the page's skeleton, style and scripts. This module prepares the data: it computes the sums
that the page shows, in float64 from the full numbers, shortens single numbers, and adds the colours.
"""

from __future__ import annotations

import html
import json
import math
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from moejax.report import aggregate, colours, merge
from moejax.report.schema import RelevanceReport

_DIGITS = 5
_SCRIPTS = (
    "basics.js",
    "heat_map.js",
    "header.js",
    "tokens.js",
    "maps.js",
    "edges.js",
    "ledger.js",
    "downloads.js",
    "start.js",
)
# "</script" ends a script element, whatever its type; older JavaScript reads U+2028 as the end of a line
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}

_MOST_SLOTS = 300_000
"""Most numbers of routed slots on a page (some 3 MB); beyond, the page has sums by expert alone."""

_MOST_EDGES = 400_000
"""Most numbers of attention edges on a page; beyond, edges are summed over heads, or left out."""

_FALLBACK_TARGETS = 8
"""Number of targets whose ledgers a viewer without scripts shows."""


def to_html(report: RelevanceReport) -> str:
    """The explanation as a self-contained page, to open from disk, to mail, or to show in a notebook's frame.

    Raises:
        ValueError: the arrays of the report do not fit together.
    """
    aggregate.check(report)
    return Template(_asset("page.html")).substitute(
        title=_ascii(html.escape(f"{aggregate.visible(report['model'])}: relevance")),
        style=colours.page_style() + _asset("page.css"),
        fallback=_fallback(report),
        script=_script(),
        data=_embed(_payload(report)),
    )


def to_notebook(report: RelevanceReport) -> str:
    """The page in a frame, for a notebook's output; the frame grows with its content.

    Viewers that strip frames, as GitHub does, show the ledgers in its place; the page hides them where it runs.

    Raises:
        ValueError: the arrays of the report do not fit together.
    """
    style = "width:100%;height:640px;border:0;display:block"
    source = html.escape(to_html(report), quote=True)
    return f'<div>{_fallback(report)}</div><iframe style="{style}" title="Relevance report" srcdoc="{source}"></iframe>'


def _fallback(report: RelevanceReport) -> str:
    """Model, rule and the ledgers of some targets, without scripts or style."""
    targets = report["targets"][:_FALLBACK_TARGETS]
    lines = [f"{report['model']}, {report['rule']}"]
    lines += [f"{t['label']}: {aggregate.summary_line(report, n)}" for n, t in enumerate(targets)]
    lines += [f"and {len(report['targets']) - len(targets)} more targets"] * (len(report["targets"]) > len(targets))
    return "".join(f"<p>{_ascii(html.escape(aggregate.visible(line)))}</p>" for line in lines)


def _payload(report: RelevanceReport) -> dict[str, Any]:
    spans = merge.word_spans(report["tokens"], merge.prompt_length(report))
    several = len(spans) < len(report["tokens"])
    base = _view(report)
    targets = [_target(report, index) | part for index, part in enumerate(base.pop("targets"))]
    return {
        **{key: report[key] for key in ("model", "rule", "prompt", "num_experts")},
        **base,
        "words": _view(merge.merge_report(report, spans)) if several else None,
        "slots": int(np.shape(report["expert_ids"])[2]),
        "counts": aggregate.routed_counts(report).tolist(),
        "targets": targets,
        "colours": {"light": colours.DIVERGING, "dark": colours.DIVERGING_DARK},
    }


def _view(report: RelevanceReport) -> dict[str, Any]:
    """What depends on whether the page shows tokens or words."""
    targets, heads = report["targets"], _heads_of_edges(report)
    with_slots = len(targets) * np.size(report["expert_ids"]) <= _MOST_SLOTS
    return {
        "tokens": report["tokens"],
        "token_ids": report["token_ids"],
        "prompt_length": merge.prompt_length(report),
        "expert_ids": report["expert_ids"] if with_slots else None,
        "expert_weights": _shorten(report["expert_weights"]) if with_slots else None,
        "targets": [
            {
                "position": target["position"],
                "tokens": _shorten(target["tokens"]),
                "layers": _shorten(target["layers"]),
                "experts": _shorten(target["experts"]) if with_slots else None,
                "edges": {name: _edges(e, heads[name]) for name, e in target.get("edges", {}).items() if heads[name]},
            }
            for target in targets
        ],
    }


def _target(report: RelevanceReport, index: int) -> dict[str, Any]:
    """What is the same for tokens and words."""
    target = report["targets"][index]
    return {
        "label": target["label"],
        "value": _finite(target["value"]),
        "candidates": _finite(target["candidates"]),
        "layer_sums": _finite(aggregate.floats(target["layers"]).sum(axis=1).tolist()),
        "expert_map": _shorten(aggregate.expert_map(report, index).tolist()),
        "head_map": _shorten(aggregate.head_map(report, index).tolist()),
        "ledger": _finite(target["ledger"]),
        "summary": aggregate.summary_line(report, index),
    }


def _heads_of_edges(report: RelevanceReport) -> dict[str, int]:
    """Number of heads by which a page shows the edges of each layer: all, 1 for their sum, or 0."""
    shapes = {name: np.shape(e) for target in report["targets"] for name, e in target.get("edges", {}).items()}
    pairs = len(report["targets"]) * sum(shape[-1] ** 2 for shape in shapes.values()) // 2
    most = {name: shape[0] for name, shape in shapes.items()}
    if pairs * max(most.values(), default=0) <= _MOST_EDGES:
        return most
    return dict.fromkeys(shapes, 1 if pairs <= _MOST_EDGES else 0)


def _edges(edges: Any, heads: int) -> Any:
    """Relevance of edges [heads, T, t + 1], where query t reads the keys up to it."""
    values = aggregate.floats(edges)
    values = values if heads == len(values) else values.sum(0, keepdims=True)
    return [[_shorten(row[: query + 1].tolist()) for query, row in enumerate(head)] for head in values]


def _shorten(values: Any) -> Any:
    """Nested lists of floats, rounded to five significant digits: a long prompt has millions of them."""
    if isinstance(values, list):
        return [_shorten(value) for value in values]
    return float(f"{values:.{_DIGITS}g}") if values is not None and math.isfinite(values) else None


def _finite(value: Any) -> Any:
    """The same value with ``None`` in place of floats that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _embed(payload: dict[str, Any]) -> str:
    # ensure_ascii escapes U+2028 and lone surrogates too, so the page can be saved in any encoding
    return json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _script() -> str:
    """The page's scripts as one function, so that their names stay out of the page's global scope."""
    return "(() => {\n'use strict';\n\n" + "\n".join(map(_asset, _SCRIPTS)) + "})();\n"


def _asset(name: str) -> str:
    return (resources.files("moejax.report") / "page" / name).read_text(encoding="utf-8")
