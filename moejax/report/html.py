"""An explanation as one self-contained HTML page, which needs no network, server or library.

The folder ``page/`` has the page's skeleton, style and script. This module prepares the data: it computes the sums that
the page shows, in float64 from the full numbers, shortens single numbers, and adds the colours.
"""

from __future__ import annotations

import html
import json
import math
from importlib import resources
from string import Template
from typing import Any

from moejax.report import aggregate, colours
from moejax.report.schema import RelevanceReport

_DIGITS = 5
_SCRIPTS = ("basics.js", "heat_map.js", "sections.js")
# "</script" ends a script element, whatever its type; older JavaScript reads U+2028 as the end of a line
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def to_html(report: RelevanceReport) -> str:
    """The explanation as a self-contained page, to open from disk, to mail, or to show in a notebook's frame.

    Raises:
        ValueError: the arrays of the report do not fit together.
    """
    aggregate.check(report)
    return Template(_asset("page.html")).substitute(
        title=_ascii(html.escape(f"{report['model']}: relevance")),
        style=colours.page_style() + _asset("page.css"),
        script=_script(),
        data=_embed(_payload(report)),
    )


def _payload(report: RelevanceReport) -> dict[str, Any]:
    same = ("model", "rule", "prompt", "tokens", "token_ids", "num_experts", "expert_ids")
    return {
        **{key: report[key] for key in same},
        "expert_weights": _shorten(report["expert_weights"]),
        "counts": aggregate.routed_counts(report).tolist(),
        "targets": [_target(report, index) for index in range(len(report["targets"]))],
        "colours": {"light": colours.DIVERGING, "dark": colours.DIVERGING_DARK},
    }


def _target(report: RelevanceReport, index: int) -> dict[str, Any]:
    target = report["targets"][index]
    return {
        "label": target["label"],
        "position": target["position"],
        "value": _finite(target["value"]),
        "candidates": _finite(target["candidates"]),
        "tokens": _shorten(target["tokens"]),
        "layers": _shorten(target["layers"]),
        "layer_sums": _finite(aggregate.floats(target["layers"]).sum(axis=1).tolist()),
        "experts": _shorten(target["experts"]),
        "expert_map": _shorten(aggregate.expert_map(report, index).tolist()),
        "head_map": _shorten(aggregate.head_map(report, index).tolist()),
        "ledger": _finite(target["ledger"]),
        "summary": aggregate.summary_line(report, index),
    }


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
