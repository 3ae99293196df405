"""The colours of every view: terminal, figures and page.

The page receives its colours from here and draws with them by ``colour`` in ``page/basics.js``. How values are scaled
to colours is ``SCALES`` for terminal and figures; the page has the same scales as a button (``page/header.js``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.errors import MoejaxError

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

DIVERGING: tuple[Colour, ...] = ((33, 102, 172), (146, 197, 222), (255, 255, 255), (244, 165, 130), (178, 24, 43))
"""Blue, white, red at -1, -1/2, 0, 1/2, 1. People with any common colour blindness can tell them apart."""

DIVERGING_DARK: tuple[Colour, ...] = ((126, 194, 247), (45, 107, 163), (37, 42, 49), (168, 74, 60), (255, 160, 138))
"""The same scale for a dark page; zero has the grey of the page."""

GREY = "#57606a"
"""Axes, captions and marks in figures."""

GRID = "#d0d7de"
"""Grid lines in figures."""

MISSING = "#e5e7eb"
"""Cells of a map without a value."""

SERIES = (("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#E69F00", "D"), ("#009E73", "v"))
"""Colour and marker of each line in a plot: the palette of Okabe and Ito, for readers with colour blindness."""

SHARES = "YlGnBu"
"""Matplotlib's name of the scale for fractions, from 0 up."""

RATIOS = "PuOr_r"
"""Matplotlib's name of the scale for logarithms of ratios, white at a ratio of one."""

PAGE_LIGHT = {
    "page": "#f6f7f9",
    "card": "#ffffff",
    "line": "#dfe3e8",
    "text": "#1b1f24",
    "soft": GREY,
    "accent": "#0b5cad",
    "accent-ink": "#ffffff",
    "bar": "#d9e5f1",
    "tip": "#1b1f24",
    "tip-ink": "#f6f7f9",
    "cursor": "#000000",
}
"""Style variables of the page in a light colour scheme."""

PAGE_DARK = {
    "page": "#111418",
    "card": "#191d23",
    "line": "#303740",
    "text": "#e6e9ed",
    "soft": "#a3adb8",
    "accent": "#7ab8f5",
    "accent-ink": "#0d1117",
    "bar": "#22364e",
    "tip": "#e6e9ed",
    "tip-ink": "#14181d",
    "cursor": "#ffffff",
}
"""The same in a dark colour scheme."""


SCALES = ("linear", "sqrt")
"""How colours grow with a value: in proportion, or with its square root, which shows small values beside large ones."""


def check_scale(scale: str) -> str:
    """Return ``scale``.

    Raises:
        MoejaxError: it is none of :data:`SCALES`.
    """
    if scale not in SCALES:
        raise MoejaxError(f"scale={scale!r} is unknown; choose from {', '.join(SCALES)}.")
    return scale


def signed_root(values: Any) -> Any:
    """Square roots of absolute values, with the signs of the values."""
    return np.sign(values) * np.sqrt(np.abs(values))


def signed_square(values: Any) -> Any:
    """The inverse of :func:`signed_root`."""
    return np.sign(values) * np.square(values)


def diverging(value: float, scale: float, stops: Sequence[Colour] = DIVERGING) -> Colour:
    """The colour of a signed value: blue at ``-scale``, white at zero, red at ``+scale``; white if not finite."""
    unit = min(1.0, max(-1.0, value / scale)) if np.isfinite(value) else 0.0
    place = (unit + 1.0) / 2.0 * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    near, far, part = stops[left], stops[left + 1], place - left
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(near, far, strict=True))
    return red, green, blue


def ink(background: Colour) -> Colour:
    """Black or white text, whichever reads better on a background (WCAG contrast; never under 4.5)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255.0 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def page_style() -> str:
    """The page's colours as style sheet text: those of the system's scheme, unless the reader selected one."""

    def rule(where: str, scheme: str, variables: dict[str, str]) -> str:
        listed = " ".join(f"--{name}: {value};" for name, value in variables.items())
        return f"{where} {{ color-scheme: {scheme}; {listed} }}"

    light, dark = rule(":root", "light", PAGE_LIGHT), rule(':root[data-theme="dark"]', "dark", PAGE_DARK)
    system = rule(':root:not([data-theme="light"])', "dark", PAGE_DARK)
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {system} }}\n{dark}\n"
