"""The page's parts beside plain tokens: words, attention edges, the answer, and the frame that a notebook shows."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from made_reports import HOSTILE, E, K, L, Page, T, make_report, payload

from moejax.report import html as page_module
from moejax.report import merge, summary_line, to_html, to_notebook

pytestmark = pytest.mark.fast

# "ab cd's!" and an answer "ef": words reach over tokens 0-1, 2-4 and 10-11
PIECES = ["a", "b", " c", "d", "'s", "!", "\n", " <i>", "x", "中", " e", "f"]
MERGED = ["ab", " cd's", "!", "\n", " <i>", "x", "中", " ef"]


def with_edges(report: dict[str, Any], heads: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    for target in report["targets"]:
        target["edges"] = {str(layer): np.tril(rng.normal(size=(heads, T, T))).tolist() for layer in (0, 2)}
    return report


def test_the_page_has_the_words_beside_the_tokens() -> None:
    report = make_report(tokens=PIECES) | {"prompt_length": 10}
    data = payload(to_html(report))
    words = data["words"]
    assert words["tokens"] == MERGED
    assert (data["prompt_length"], words["prompt_length"]) == (10, 7)
    assert words["token_ids"][:3] == [-1, -1, 105]
    for target, merged in zip(report["targets"], words["targets"], strict=True):
        assert len(merged["tokens"]) == len(MERGED)
        np.testing.assert_allclose(merged["tokens"][1], sum(target["tokens"][2:5]), rtol=1e-4)
        np.testing.assert_allclose(np.sum(merged["layers"], axis=1), np.sum(target["layers"], axis=1), rtol=1e-3)
    assert payload(to_html(make_report()))["words"] is None, "every token is a word"


def test_edges_are_sent_up_to_each_query() -> None:
    report = with_edges(make_report(tokens=PIECES))
    data = payload(to_html(report))
    for target, sent in zip(report["targets"], data["targets"], strict=True):
        assert list(sent["edges"]) == ["0", "2"]
        for name, heads in sent["edges"].items():
            assert [len(row) for row in heads[1]] == list(range(1, T + 1))
            np.testing.assert_allclose(heads[1][5], target["edges"][name][1][5][:6], rtol=1e-4)
    of_words = data["words"]["targets"][0]["edges"]["0"]
    spans = merge.word_spans(PIECES, T)
    q, k = slice(*spans[1]), slice(*spans[0])
    want = np.asarray(report["targets"][0]["edges"]["0"])[2, q, k].sum()
    np.testing.assert_allclose(of_words[2][1][0], want, rtol=1e-4)
    assert payload(to_html(make_report()))["targets"][0]["edges"] == {}


def test_what_is_too_much_for_a_page_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    report = with_edges(make_report(targets=1))
    monkeypatch.setattr(page_module, "_MOST_SLOTS", L * T * K - 1)
    monkeypatch.setattr(page_module, "_MOST_EDGES", T * T)
    target = payload(to_html(report))["targets"][0]
    assert target["experts"] is None
    assert np.shape(target["expert_map"]) == (L, E)
    assert len(target["edges"]["2"]) == 1, "the sum over heads"
    np.testing.assert_allclose(
        target["edges"]["2"][0][7][3], np.asarray(report["targets"][0]["edges"]["2"])[:, 7, 3].sum(), rtol=1e-4
    )
    monkeypatch.setattr(page_module, "_MOST_EDGES", T)
    assert payload(to_html(report))["targets"][0]["edges"] == {}


def test_the_reader_can_choose_the_theme() -> None:
    page = to_html(make_report())
    assert page.count('[data-theme="dark"]') == 1
    assert '@media (prefers-color-scheme: dark) { :root:not([data-theme="light"])' in page


# ------------------------------------------------------------------------------------------------ a notebook's output


class _Output(HTMLParser):
    """Elements of a notebook's output, and the page in its frame."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.page = ""
        self.feed(output)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.page = dict(attrs).get("srcdoc") or self.page


def hostile() -> dict[str, Any]:
    report = with_edges(make_report(tokens=HOSTILE)) | {"prompt_length": 8}
    report |= {
        "model": '"><script>alert(1)</script>',
        "rule": "<img src=x onerror=alert(1)>",
        "prompt": "' srcdoc=\"<b>\u202e",
    }
    report["targets"][0]["label"] = "</p></noscript></iframe><script>alert(1)</script>\u202e"
    return report


def test_the_frame_holds_the_page() -> None:
    report = make_report(tokens=PIECES)
    shown = _Output(to_notebook(report))
    assert shown.tags.count("iframe") == 1
    assert shown.page == to_html(report)


def test_nothing_in_a_report_becomes_markup() -> None:
    report = hostile()
    shown = _Output(to_notebook(report))
    assert set(shown.tags) == {"div", "p", "iframe"}
    page = Page(shown.page)
    assert page.tags.count("script") == 2
    assert not {"img", "b", "i", "iframe"} & set(page.tags)
    assert "\u202e" not in shown.page + to_notebook(report), "text cannot turn around what surrounds it"
    assert payload(shown.page)["targets"][0]["label"] == report["targets"][0]["label"]
    assert "default-src 'none'" in shown.page


def test_scripts_write_text_alone() -> None:
    script = re.findall(r"<script>(.*?)</script>", to_html(make_report()), re.S)[0]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage|fetch\(", script
    )


def test_viewers_without_scripts_see_the_ledgers() -> None:
    report = make_report()
    before = to_notebook(report).split("<iframe")[0]
    for n in range(len(report["targets"])):
        assert html.escape(summary_line(report, n)) in before
    many = make_report(targets=11)
    assert "and 3 more targets" in to_notebook(many)
    noscript = re.findall(r"<noscript>(.*?)</noscript>", to_html(report), re.S)[0]
    assert html.escape(summary_line(report, 0)) in noscript
