"""A relevance report as one page that needs nothing else: no network, no server, no library.

The page itself lives in `page/` (a skeleton, its style and its script). This module only prepares the data: what the
page shows as a sum is summed here, in float64 from the full numbers, and the many single numbers are shortened.
"""

from __future__ import annotations

import html
import json
import math
from importlib import resources
from string import Template
from typing import Any

from moejax.report import aggregate
from moejax.report.aggregate import Report

_DIGITS = 5
# A script element ends at the first "</script", whatever its type, and U+2028 ended a line in older JavaScript.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def to_html(report: Report) -> str:
    """The report as a self-contained page: open it from a disk, mail it, or show it in a notebook's frame."""
    aggregate.check(report)
    return Template(_asset("page.html")).substitute(
        title=_ascii(html.escape(f"{report['model']}: relevance")),
        style=_asset("page.css"),
        script=_asset("page.js"),
        data=_embed(_payload(report)),
    )


def _payload(report: Report) -> dict[str, Any]:
    same = ("model", "rule", "prompt", "tokens", "token_ids", "num_experts", "expert_ids")
    return {
        **{key: report[key] for key in same},
        "expert_weights": _shorten(report["expert_weights"]),
        "counts": aggregate.routed_counts(report).tolist(),
        "targets": [_target(report, index) for index in range(len(report["targets"]))],
    }


def _target(report: Report, index: int) -> dict[str, Any]:
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
    """Nested lists of floats to five significant digits: a long prompt has millions of them."""
    if isinstance(values, list):
        return [_shorten(value) for value in values]
    return float(f"{values:.{_DIGITS}g}") if values is not None and math.isfinite(values) else None


def _finite(value: Any) -> Any:
    """The same value with null for a float that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _embed(payload: dict[str, Any]) -> str:
    # ensure_ascii writes U+2028 and lone surrogates as escapes too, so the page can be saved in any encoding.
    return json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _asset(name: str) -> str:
    return (resources.files("moejax.report") / "page" / name).read_text(encoding="utf-8")
