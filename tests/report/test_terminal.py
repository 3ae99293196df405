"""The terminal shows every token, sign and number, whatever a token says in markup."""

from __future__ import annotations

import io
import re

import pytest
from made_reports import HOSTILE, L, N, make_report, printed
from rich.console import Console

from moejax.errors import MoejaxError
from moejax.report import aggregate, render, summary_line
from moejax.report.colours import DIVERGING

pytestmark = pytest.mark.fast


def test_terminal_without_colour_keeps_every_sign_and_number() -> None:
    report = make_report(targets=1)
    text = printed(report)
    assert "\x1b" not in text
    for token, value in zip(report["tokens"], report["targets"][0]["tokens"], strict=True):
        assert f"{token}[{value:+.2g}]" in text
    assert "' Paris' 41.0%" in text
    assert summary_line(report, 0) in text


def test_terminal_colours_the_strongest_token_fully() -> None:
    report = make_report(targets=1)
    report["targets"][0]["tokens"][3] = 50.0
    text = printed(report, colour=True)
    red = ";".join(map(str, DIVERGING[-1]))
    assert re.search(rf"48;2;{red}m word3", text)


def test_terminal_by_square_roots() -> None:
    report = make_report(targets=1)
    report["targets"][0]["tokens"][3:5] = [64.0, 16.0]
    stream = io.StringIO()
    render(report, Console(file=stream, width=2000, force_terminal=True, color_system="truecolor"), scale="sqrt")
    half = ";".join(map(str, DIVERGING[3]))
    assert re.search(rf"48;2;{half}m word4", stream.getvalue())
    with pytest.raises(MoejaxError, match="scale='log' is unknown"):
        render(report, scale="log")


def test_terminal_shows_hostile_tokens_verbatim() -> None:
    text = printed(make_report(tokens=HOSTILE))
    for token in ("</script><script>alert(1)</script>", "<b>", " [bold]red[/bold]", "😀", " $x^$", "&amp;", "中文"):
        assert token + "[" in text
    assert re.search(r"↵\[[^]]*\]\n", text), "a newline is shown as a sign, then breaks the line"
    assert "\x1b" not in text
    assert "\\x1b[31m[" in text
    assert "\\u2028[" in text
    assert "∅[" in text


def test_terminal_prints_every_target() -> None:
    report = make_report()
    text = printed(report)
    for n in range(N):
        assert f"target {n + 1}/{N}" in text
        assert summary_line(report, n) in text


@pytest.mark.parametrize("top", [1, 3, 50])
def test_terminal_expert_table_has_the_top_experts(top: int) -> None:
    report = make_report(targets=1)
    rows = [line for line in printed(report, top=top).splitlines() if re.match(r" +\d+ +E\d", line)]
    assert len(rows) == L
    for layer, row in enumerate(rows):
        uses = aggregate.top_experts(report, 0, top)[layer]
        assert re.findall(r"E(\d+)", row) == [str(use.expert) for use in uses]
        assert f"{uses[0].relevance:+.3g}" in row
        assert f"{uses[0].share:.0%}" in row
        assert f"{uses[0].tokens}t" in row


def test_terminal_that_only_knows_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render(make_report(tokens=HOSTILE), Console(file=stream, width=200, color_system=None))
    stream.flush()
    assert b"\\U0001f600" in raw.getvalue()


def test_the_ledger_stays_one_line_in_a_narrow_pipe() -> None:
    report = make_report(targets=1)
    assert summary_line(report, 0) in printed(report, width=40).splitlines()
