"""A relevance report as a small HTML table, which a notebook shows for a result that ends a cell."""

from __future__ import annotations

import html

from moejax.report import aggregate, colours
from moejax.report.schema import RelevanceReport

_TARGETS = 8
"""Number of targets that are shown; the page has all of them."""


def notebook_table(report: RelevanceReport, top: int = 3) -> str:
    """Format each target's tokens, coloured by relevance, and the ``top`` experts of each layer."""
    shown = range(min(len(report["targets"]), _TARGETS))
    heading = f"<p><b>{_text(report['model'])}</b>, {_text(report['rule'])}</p>"
    rest = len(report["targets"]) - len(shown)
    ending = f"<p>and {rest} more targets: save_html has them all</p>" if rest else ""
    return heading + "".join(_target(report, index, top) for index in shown) + ending


def _target(report: RelevanceReport, index: int, top: int) -> str:
    """Format one target."""
    target = report["targets"][index]
    values = aggregate.floats(target["tokens"])
    scale = aggregate.scale_of(values)
    tokens = "".join(_token(token, value, scale) for token, value in zip(report["tokens"], values, strict=True))
    rows = [("target", f"{_text(target['label'])} ({target['value']:.3f})"), ("tokens", tokens)]
    for layer, uses in enumerate(aggregate.top_experts(report, index, top)):
        if uses:
            rows.append((f"layer {layer}", ", ".join(f"expert {use.expert} ({use.relevance:+.3f})" for use in uses)))
    rows.append(("ledger", _text(aggregate.summary_line(report, index).removeprefix("ledger: "))))
    cells = "".join(
        f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{cell}</td></tr>'
        for name, cell in rows
    )
    return f"<table>{cells}</table>"


def _token(token: str, value: float, scale: float) -> str:
    """Format a token on the colour of its relevance, which is its tooltip."""
    background = colours.diverging(value, scale)
    style = f"background:rgb{background};color:rgb{colours.ink(background)};padding:0 2px;white-space:pre"
    return f'<span style="{style}" title="{value:.4g}">{_text(aggregate.visible(token))}</span>'


def _text(text: str) -> str:
    return html.escape(text)
