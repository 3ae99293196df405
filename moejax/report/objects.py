"""Small tables for objects that a notebook shows."""

import html
from collections.abc import Mapping


def properties_html(title: str, rows: Mapping[str, str]) -> str:
    """A titled table with one row for each property."""
    left = 'style="text-align:left"'
    cells = "".join(
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"
