"""One source of colours for terminal, figures and page."""

import math
import re

import numpy as np
from made_reports import make_report, payload

from moejax.report import to_html
from moejax.report.colours import DIVERGING, DIVERGING_DARK, PAGE_DARK, PAGE_LIGHT, diverging, ink


def test_colours_diverge_and_stay_readable() -> None:
    assert diverging(0.0, 2.0) == (255, 255, 255)
    blue, red = diverging(-2.0, 2.0), diverging(2.0, 2.0)
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    assert diverging(9.0, 2.0) == red
    assert diverging(math.nan, 2.0) == (255, 255, 255)
    for value in np.linspace(-1, 1, 101):
        background = diverging(float(value), 1.0)
        assert _contrast(background, ink(background)) >= 4.5


def _contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    def luminance(rgb: tuple[int, ...]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_page_has_the_colours_of_the_other_views() -> None:
    page = to_html(make_report())
    data = payload(page)
    assert data["colours"]["light"] == [list(stop) for stop in DIVERGING]
    assert data["colours"]["dark"] == [list(stop) for stop in DIVERGING_DARK]
    assert PAGE_LIGHT.keys() == PAGE_DARK.keys()
    for name, value in [*PAGE_LIGHT.items(), *PAGE_DARK.items()]:
        assert f"--{name}: {value};" in page
        assert f"var(--{name})" in page or f"'--{name}'" in page, "no colour is sent in vain"
    style = page.split("</style>")[0]
    assert set(re.findall(r"var\(--([a-z-]+)\)", style)) == PAGE_LIGHT.keys() - {"cursor"} | {"sans", "mono"}
