"""Merging of tokens: where words begin, which spans are refused, and that nothing gets lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_reports import E, T, brute_force_map, make_report

from moejax.errors import MoejaxError
from moejax.report import aggregate, merge

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([" w", "ides", "p", "read", " conf", "lict", "s", ","], [" widespread", " conflicts", ","]),
        (["don", "'t", " \u2019", "tis"], ["don't", " \u2019", "tis"]),
        (["a", "\n", "b", " ", "c"], ["a", "\n", "b", " ", "c"]),
        (["<s>", "He", "llo", "</s>"], ["<s>", "Hello", "</s>"]),
        (["x", "=", "10", "24", ".", "5"], ["x", "=", "1024", ".", "5"]),
        (
            ["\u4e2d", "\u6587", "\u304b", "\u306a", "\u0e44\u0e17", "\u0e22"],
            ["\u4e2d", "\u6587", "\u304b", "\u306a", "\u0e44\u0e17", "\u0e22"],
        ),
        (["caf", "\ufffd", "\ufffd", " au"], ["caf\ufffd\ufffd", " au"]),
        (["\u0939", "\u093f", "\u0928", "\u094d", "\u0926\u0940"], ["\u0939\u093f\u0928\u094d\u0926\u0940"]),
        (["a", "", "b"], ["ab"]),
        (["\u20ac", "", "", "x"], ["\u20ac", "x"]),
        (["[476]", "[12]"], ["[476]", "[12]"]),
        (["one"], ["one"]),
    ],
)
def test_words(pieces: list[str], words: list[str]) -> None:
    spans = merge.word_spans(pieces, len(pieces))
    assert merge.merge_pieces(pieces, spans) == words
    assert [t for span in spans for t in range(*span)] == list(range(len(pieces)))


def test_no_word_reaches_into_the_answer() -> None:
    assert merge.word_spans(["a", "b", "c", "d"], 2) == [(0, 2), (2, 4)]


def test_gaps_between_spans_are_filled() -> None:
    assert merge.tiled([(1, 3), (3, 4)], 6, 6) == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]
    assert merge.tiled([], 2, 2) == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 2), (1, 3)], r"span \(1, 3\) overlaps a span before it \(token 1\)"),
        ([(2, 2)], "is empty or out of range: give spans in order within 0..6"),
        ([(4, 7)], "out of range"),
        ([(-1, 2)], "out of range"),
        ([(1, 2, 3)], "is no pair"),
        ([(3, 5)], "holds tokens of prompt and answer; split it at token 4"),
    ],
)
def test_spans_that_do_not_fit(spans: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(MoejaxError, match=message):
        merge.tiled(spans, 6, 4)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, T - 1)), st.integers(0, 3))
def test_a_merged_report_keeps_every_sum(cuts: set[int], seed: int) -> None:
    report = make_report(seed=seed)
    edges = [0, *sorted(cuts), T]
    merged = merge.merge_report(report, list(pairwise(edges)))  # type: ignore[arg-type]
    aggregate.check(merged)
    for n, (before, after) in enumerate(zip(report["targets"], merged["targets"], strict=True)):
        for name in ("tokens", "layers", "heads"):
            axis = int(name != "tokens")
            np.testing.assert_allclose(np.sum(after[name], axis=axis), np.sum(before[name], axis=axis), atol=1e-12)
        np.testing.assert_allclose(aggregate.expert_map(merged, n), brute_force_map(report, n), atol=1e-12)
        assert edges[after["position"]] <= before["position"] < edges[after["position"] + 1]
    np.testing.assert_allclose(np.sum(merged["expert_weights"], axis=(1, 2)), T)


def test_a_merged_token_has_each_expert_once() -> None:
    ids = np.array([[[2, 0], [0, 2], [1, -1], [3, 4]]])
    weights = np.array([[[0.6, 0.4], [0.7, 0.3], [1.0, 0.0], [0.5, 0.5]]])
    slots = merge.MergedSlots.of(ids, weights, E, [(0, 3), (3, 4)])
    assert slots.ids.tolist() == [[[0, 1, 2], [3, 4, -1]]]
    np.testing.assert_allclose(slots.weights, [[[1.1, 1.0, 0.9], [0.5, 0.5, 0.0]]])
    values = np.array([[[[1.0, 2.0], [3.0, 4.0], [5.0, 0.0], [6.0, 7.0]]]])
    assert slots.merge_all(values).tolist() == [[[[5.0, 5.0, 5.0], [6.0, 7.0, 0.0]]]]
