"""The report shows what it was given: every number, every token, and nothing that a token says in markup."""

from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_reports import (
    HOSTILE,
    E,
    H,
    K,
    L,
    N,
    Page,
    T,
    brute_force_map,
    make_report,
    make_zero_report,
    payload,
    printed,
)

from moejax.report import aggregate, figure, summary_line, to_html
from moejax.report.schema import SCHEMA

pytestmark = pytest.mark.fast

# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("target", range(N))
def test_expert_map_sums_every_slot_into_its_expert(target: int) -> None:
    report = make_report()
    found = aggregate.expert_map(report, target)
    assert found.shape == (L, E)
    np.testing.assert_allclose(found, brute_force_map(report, target), rtol=1e-12, atol=1e-12)


def test_counts_are_tokens_routed() -> None:
    report = make_report()
    counts = aggregate.routed_counts(report)
    expected = [[sum(e in slots for slots in layer) for e in range(E)] for layer in report["expert_ids"]]
    assert counts.tolist() == expected
    assert counts.sum() == L * T * K


def test_head_map_sums_over_tokens() -> None:
    report = make_report()
    expected = np.asarray(report["targets"][1]["heads"]).sum(axis=1)
    assert expected.shape == (L, H)
    np.testing.assert_allclose(aggregate.head_map(report, 1), expected)


def test_top_experts_rank_by_the_size_of_the_signed_sum() -> None:
    report = make_report()
    sums = brute_force_map(report, 0)
    for layer, uses in enumerate(aggregate.top_experts(report, 0, top=E)):
        sizes = np.abs(sums[layer])
        assert [use.expert for use in uses] == [int(e) for e in np.argsort(-sizes)]
        assert sum(use.share for use in uses) == pytest.approx(1.0)
        for use in uses:
            assert use.relevance == pytest.approx(sums[layer, use.expert])
            assert use.share == pytest.approx(sizes[use.expert] / sizes.sum())


def test_an_expert_whose_tokens_cancel_ranks_last() -> None:
    report = make_report(targets=1, length=2, tokens=["a", "b"])
    report["expert_ids"] = [[[0, 1], [0, 2]]] * L
    report["targets"][0]["experts"] = [[[5.0, 0.2], [-5.0, 0.1]]] * L
    for uses in aggregate.top_experts(report, 0, top=9):
        assert [(use.expert, use.tokens) for use in uses] == [(1, 1), (2, 1), (0, 2)]


# ------------------------------------------------------------------------------------------------ the ledger line


def ledger_report(total: float, tokens: float, leaks: dict[str, list[float]], residual: float) -> dict[str, Any]:
    report = make_report(targets=1)
    report["targets"][0]["ledger"] = {"target": total, "tokens": tokens, "leaks": leaks, "residual": residual}
    return report


def test_summary_line_is_the_equation() -> None:
    report = ledger_report(7.218, 5.59, {"softmax": [1.0, 0.628, 0, 0, 0]}, 2.4e-7)
    expected = "ledger: logit 7.218 = tokens 5.590 + softmax 1.628 + residual 2.4e-07 (3.3e-08 of the logit)"
    assert summary_line(report, 0) == expected


def test_summary_line_puts_the_sign_in_the_operator() -> None:
    report = ledger_report(-2.0, -1.5, {"router": [-0.25, -0.25, 0, 0, 0]}, -1e-6)
    expected = "ledger: logit -2.000 = tokens -1.500 - router 0.500 - residual 1.0e-06 (5.0e-07 of the logit)"
    assert summary_line(report, 0) == expected


@pytest.mark.parametrize("leaks", [{}, {"softmax": []}])
def test_summary_line_without_leaks_or_logit(leaks: dict[str, list[float]]) -> None:
    line = summary_line(ledger_report(0.0, 0.0, leaks, 0.0), 0)
    assert line.startswith("ledger: logit 0.000 = tokens 0.000")
    assert line.endswith("+ residual 0.0e+00")


def test_summary_line_adds_up_for_every_target() -> None:
    report = make_report()
    for n in range(N):
        words = summary_line(report, n).split(" (")[0].removeprefix("ledger: logit ").split(" ")
        total, terms = float(words[0]), words[1:]
        added = sum((-1 if sign == "-" else 1) * float(x) for sign, _, x in zip(*[iter(terms)] * 3, strict=True))
        assert added == pytest.approx(total, abs=3e-3)


# ------------------------------------------------------------------------------------------------ page


def test_page_carries_the_aggregates() -> None:
    report = make_report()
    data = payload(to_html(report))
    assert len(data["targets"]) == N
    for n, target in enumerate(data["targets"]):
        np.testing.assert_allclose(target["expert_map"], brute_force_map(report, n), rtol=1e-4)
        np.testing.assert_allclose(target["experts"], report["targets"][n]["experts"], rtol=1e-4)
        np.testing.assert_allclose(target["layers"], report["targets"][n]["layers"], rtol=1e-4)
        np.testing.assert_allclose(target["layer_sums"], np.sum(report["targets"][n]["layers"], axis=1))
        assert target["ledger"] == report["targets"][n]["ledger"], "the ledger is not shortened"
        assert target["summary"] == summary_line(report, n)
    assert np.asarray(data["counts"]).sum() == L * T * K


def test_page_keeps_hostile_text_as_text() -> None:
    report = make_report(tokens=HOSTILE)
    report["model"] = '<img src=x onerror="alert(1)">'
    report["prompt"] = "$title ${data} </title>"
    page = to_html(report)
    parsed = Page(page)
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags
    assert "b" not in parsed.tags
    assert not set("<>&\u2028") & set(parsed.data)
    data = json.loads(parsed.data)
    assert data["tokens"] == HOSTILE
    assert data["model"] == report["model"]
    assert data["prompt"] == report["prompt"]


def test_page_needs_nothing_else() -> None:
    page = to_html(make_report())
    parsed = Page(page)
    assert not parsed.addresses
    assert "link" not in parsed.tags
    assert "url(" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "innerHTML" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_page_can_be_written_with_half_a_surrogate() -> None:
    report = make_report(tokens=["\ud83d", *HOSTILE[1:]])
    page = to_html(report)
    assert payload(page.encode("utf-8").decode("utf-8"))["tokens"][0] == "\ud83d"


def test_page_writes_null_for_what_is_not_finite() -> None:
    report = make_report(targets=1)
    report["targets"][0]["layers"][1][2] = math.nan
    report["targets"][0]["ledger"]["residual"] = math.inf
    target = payload(to_html(report))["targets"][0]
    assert target["layers"][1][2] is None
    assert target["layer_sums"][1] is None
    assert target["ledger"]["residual"] is None


def test_long_prompt() -> None:
    report = make_report(targets=2, length=600)
    data = payload(to_html(report))
    assert len(data["tokens"]) == 600
    assert np.shape(data["targets"][1]["experts"]) == (L, 600, K)
    assert printed(report, colour=True, width=100).count("word599") >= 2
    figure(report, 1).savefig(io.BytesIO())


# ------------------------------------------------------------------------------------------------ figure


def test_figure_has_three_panels_with_the_numbers() -> None:
    report = make_report()
    drawing = figure(report, 2)
    tokens, experts, layers = drawing.axes[:3]
    heights = [patch.get_height() for patch in tokens.patches]  # type: ignore[attr-defined]
    np.testing.assert_allclose(heights, report["targets"][2]["tokens"])
    np.testing.assert_allclose(np.asarray(experts.images[0].get_array()), brute_force_map(report, 2))
    np.testing.assert_allclose(np.asarray(layers.images[0].get_array()), report["targets"][2]["layers"])
    for panel in (experts, layers):
        low, high = panel.images[0].get_clim()
        assert low == -high, "zero is white only where the scale is symmetric"
    assert drawing.get_figwidth() == 10


def test_figure_draws_hostile_tokens_without_a_warning() -> None:
    drawing = figure(make_report(tokens=HOSTILE))
    drawing.savefig(io.BytesIO())
    labels = {label.get_text() for label in drawing.axes[0].get_xticklabels()}
    assert {"<b>", "$x^$", "&amp;", "↵", "\\u2028"} <= labels


def test_figure_shows_itself_in_a_notebook_and_leaves_pyplot_alone() -> None:
    code = """
import sys
import moejax.report as report
assert "matplotlib" not in sys.modules
sys.path.insert(0, sys.argv[1])
from made_reports import make_report
assert report.figure(make_report())._repr_png_()[:4] == b"\\x89PNG"
assert "matplotlib.pyplot" not in sys.modules
"""
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ every view


@pytest.mark.parametrize("colour", [False, True])
def test_nothing_divides_by_zero_when_all_relevance_is_zero(colour: bool) -> None:
    report = make_zero_report()
    assert "ledger: logit 0.000 = tokens 0.000 + residual 0.0e+00" in printed(report, colour)
    assert "nan" not in printed(report, colour)
    assert payload(to_html(report))["targets"][0]["expert_map"] == [[0.0] * E] * L
    figure(report).savefig(io.BytesIO())


def test_views_leave_the_report_as_it_was() -> None:
    report = make_report()
    before = copy.deepcopy(report)
    printed(report)
    to_html(report)
    figure(report)
    assert report == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["tokens"].pop(), r"token_ids has shape \(12,\), expected \(11,\)"),
        (lambda r: r["targets"][1]["layers"].pop(), r"targets\[1\]\.layers has shape \(4, 12\), expected \(5, 12\)"),
        (lambda r: r.update(num_experts=3), r"expert_ids holds 0\.\.5, but num_experts is 3"),
        (lambda r: r["targets"][2].update(position=T), r"targets\[2\]\.position is 12, outside the 12 tokens"),
        (lambda r: r["targets"].clear(), "targets is empty"),
    ],
)
@pytest.mark.parametrize("view", [to_html, printed, figure])
def test_a_report_that_does_not_fit_together_is_refused(view: Any, change: Any, message: str) -> None:
    report = make_report()
    change(report)
    with pytest.raises(ValueError, match=message):
        view(report)


@pytest.mark.parametrize("view", [to_html, printed, figure])
def test_a_report_of_another_version_is_refused(view: Any) -> None:
    report = make_report() | {"schema": 2}
    with pytest.raises(ValueError, match="the report has schema 2, but this version of moejax reads 1"):
        view(report)
    report["schema"] = SCHEMA
    view(report)
