"""A result keeps its numbers: in files, in tables, and merged into words."""

import dataclasses
import json
import sys
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny.decoders import PROMPT, make_lm

import moejax
from moejax.errors import MoejaxError
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, Relevance
from moejax.relevance.store import FORMAT

N, L, T, K, E, H, F, D, J, X = 2, 3, 7, 2, 6, 4, 5, 9, 3, 8


def make_mixture(rng: np.random.Generator, slots: int, count: int, dtype: Any = np.float32) -> ExpertRelevance:
    ids = rng.integers(0, count, (L, T, slots), np.int32)
    ids[1] = -1  # a layer without experts
    weights = np.where(ids < 0, 0, rng.uniform(0.1, 1, ids.shape))
    values = np.where(ids < 0, 0, rng.normal(size=(N, L, T, slots)))
    return ExpertRelevance(values.astype(np.float32), ids, weights.astype(dtype), count)


def make_result(seed: int = 0, pieces: list[str] | None = None, prompt_length: int = 5) -> Relevance:
    """A random result with every part that a result can have; its numbers do not add up."""
    rng = np.random.default_rng(seed)

    def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    return Relevance(
        model="tiny",
        rule="AttnLRP()",
        prompt='a\u2028"\ud83d',
        token_ids=rng.integers(0, 99, T),
        pieces=pieces or [" wi", "de", "ly", " known", "\ud83d", " a", "ns"],
        prompt_length=prompt_length,
        labels=["' x'", "' y'"],
        positions=np.array([4, 6]),
        layers=random(N, L + 1, T),
        heads=random(N, L, T, H),
        feed_forward=make_mixture(rng, K, E),
        attention=make_mixture(rng, J, X, ml_dtypes.bfloat16),
        shared=random(N, L, T, 1),
        vectors={
            "neurons.0": random(N, T, K, F),
            "edges.2": np.tril(random(N, H, T, T)),
            "attention.1": random(N, T, D, dtype=np.float64),
        },
        ledger=Ledger(
            random(N, dtype=np.float64), random(N, dtype=np.float64), {"z": random(N, L + 1), "a": random(N, L + 1)}
        ),
        candidates=[[Candidate(" x", 3, 0.1 + 0.2, 1 / 3), Candidate("\n", 4, float("inf"), 1e-300)], []],
    )


def same(found: Any, want: Any) -> None:
    """Compare two results, every field of theirs, bit for bit."""
    assert type(found) is type(want)
    if dataclasses.is_dataclass(want):
        for field in dataclasses.fields(want):
            same(getattr(found, field.name), getattr(want, field.name))
    elif isinstance(want, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (want.dtype, want.shape, want.tobytes())
    elif isinstance(want, dict):
        assert list(found) == list(want)
        for key, value in want.items():
            same(found[key], value)
    else:
        assert found == want


@pytest.fixture(scope="module")
def explained() -> Relevance:
    """The relevance of an answer of two tokens, with neurons and edges."""
    nodes = ["neurons.1", "edges.0"]
    return moejax.explain(make_lm(), PROMPT, target=moejax.Continuation([11, 4]), nodes=nodes)


# ------------------------------------------------------------------------------------------------ files


def test_a_file_gives_back_every_bit(tmp_path, explained):
    explained.save(tmp_path / "rel.safetensors")
    same(moejax.Relevance.load(tmp_path / "rel.safetensors"), explained)
    assert [path.name for path in tmp_path.iterdir()] == ["rel.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {
            "feed_forward": None,
            "attention": None,
            "shared": None,
            "vectors": {},
            "ledger": Ledger(np.zeros(N), np.ones(N), {}),
        },
        {"layers": np.asfortranarray(np.arange(N * (L + 1) * T, dtype=np.float64).reshape(N, L + 1, T))},
        {"heads": np.full((N, L, T, H), np.nan), "candidates": []},
    ],
)
def test_a_file_holds_all_that_a_result_can_have(tmp_path, change):
    result = dataclasses.replace(make_result(), **change)
    result.save(str(tmp_path / "rel"))
    loaded = Relevance.load(str(tmp_path / "rel"))
    if "layers" in change:
        np.testing.assert_array_equal(loaded.layers, result.layers)
        result = dataclasses.replace(result, layers=np.ascontiguousarray(result.layers))
    same(loaded, result)
    same(loaded.aggregate(), result.aggregate())


def rewrite(path, tensors=lambda t: t, header=lambda h: h, key=FORMAT):
    """Write a saved result again with changes."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        told = json.loads(file.metadata()[FORMAT])
    save_file(tensors(load_file(path)), path, {key: json.dumps(header(told))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "other"}, "holds no result of explain; models are read by moejax.load"),
        (
            {"header": lambda h: h | {"version": 2}},
            "has version 2, but this moejax reads up to 1: pip install -U moejax",
        ),
        ({"header": lambda h: [h]}, "damaged: its header is no JSON object"),
        ({"header": lambda h: h | {"pieces": [1] * T}}, "damaged: its header has no right pieces"),
        ({"header": lambda h: h | {"candidates": [[["x", 1]]]}}, "no right candidates or mixtures"),
        ({"header": lambda h: h | {"mixtures": {"sum": {"count": 1, "of_tokens": True}}}}, "no right mixtures"),
        ({"header": lambda h: h | {"labels": ["x"]}}, r"has shape \(2,"),
        ({"header": lambda h: h | {"prompt_length": 8}}, "layers or prompt_length out of range"),
        ({"tensors": lambda t: {k: v for k, v in t.items() if k != "heads"}}, "missing, or belong to nothing: heads"),
        ({"tensors": lambda t: t | {"extra": np.zeros(1)}}, "missing, or belong to nothing: extra"),
        ({"tensors": lambda t: t | {"layers": np.zeros((N, L, T))}}, "leaks/a has shape|layers has shape|out of range"),
        ({"tensors": lambda t: t | {"shared": np.zeros((N, L, T, 2))}}, "shared has shape"),
        ({"tensors": lambda t: t | {"vectors/edges.2": np.zeros((N, H, T, T + 1))}}, "edges.2 has shape"),
        ({"tensors": lambda t: t | {"vectors/attention.1": np.zeros(N)}}, "attention.1 has shape"),
        ({"tensors": lambda t: t | {"token_ids": np.zeros(T)}}, "token_ids has shape .* dtype float64"),
        ({"tensors": lambda t: t | {"feed_forward.ids": t["feed_forward.ids"] + 5}}, "feed_forward.ids out of range"),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, message):
    path = tmp_path / "rel"
    make_result().save(path)
    rewrite(path, **changes)
    with pytest.raises(MoejaxError, match=message) as caught:
        Relevance.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "rel"
    with pytest.raises(MoejaxError, match=r"no such file; Relevance\.save writes one"):
        Relevance.load(path)
    make_result().save(path)
    for data in (path.read_bytes()[:-9], b"", b"\x80\x04pickle", b"x" * 100):
        path.write_bytes(data)
        with pytest.raises(MoejaxError, match=r"damaged, or not a file of Relevance\.save"):
            Relevance.load(path)
    with pytest.raises(MoejaxError, match="the result cannot be written"):
        make_result().save(tmp_path / "nowhere" / "rel")


# ------------------------------------------------------------------------------------------------ words and spans


def test_words_of_a_result():
    result = make_result()
    words = result.aggregate()
    assert words.pieces == [" widely", " known", "\ud83d", " ans"]
    assert words.prompt_length == 3
    assert words.positions.tolist() == [2, 3]
    assert words.token_ids.tolist() == [-1, *result.token_ids[3:5], -1]
    np.testing.assert_allclose(words.tokens[:, 0], result.tokens[:, :3].sum(-1), rtol=1e-6)
    assert words.ledger is result.ledger
    np.testing.assert_allclose(words.neurons(0, 4)[:, 0], result.neurons(0, 4)[:, :3].sum(1), rtol=1e-5, atol=1e-6)
    assert words.vectors["edges.2"].shape == (N, H, 4, 4)


spans = st.sets(st.integers(1, T - 1)).map(lambda cuts: [0, *sorted(cuts | {5}), T])


@settings(max_examples=25, deadline=None)
@given(spans, st.integers(0, 9))
def test_merging_conserves_sums(edges, seed):
    result = make_result(seed)
    merged = result.aggregate(list(pairwise(edges)))
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert merged.ledger is result.ledger
    for name in ("layers", "heads", "shared"):
        np.testing.assert_allclose(getattr(merged, name).sum(2), getattr(result, name).sum(2), **close)
    for part in ("feed_forward", "attention"):
        found, want = getattr(merged, part), getattr(result, part)
        np.testing.assert_allclose(found.by_expert(), want.by_expert(), **close)
        np.testing.assert_allclose(
            found.weights.astype(float).sum((1, 2)), want.weights.astype(float).sum((1, 2)), rtol=0.02
        )
        starts = edges[:-1]
        np.testing.assert_allclose(found.by_token(), np.add.reduceat(want.by_token(), starts, axis=2), **close)
    np.testing.assert_allclose(merged.vectors["edges.2"].sum((2, 3)), result.vectors["edges.2"].sum((2, 3)), **close)
    np.testing.assert_allclose(merged.vectors["attention.1"].sum(1), result.vectors["attention.1"].sum(1), **close)
    np.testing.assert_allclose(
        merged.vectors["neurons.0"].sum((1, 2)), result.vectors["neurons.0"].sum((1, 2)), **close
    )


def test_what_merged_slots_cannot_tell():
    words = make_result().aggregate([(0, 2)])
    for method in ("drop_renormalise", "advantage", "sensitivity"):
        with pytest.raises(
            MoejaxError, match=f"{method} compares the experts of single tokens; call it before aggregate"
        ):
            getattr(words.feed_forward, method)()
    with pytest.raises(MoejaxError, match="by='word' is unknown; give 'words', 'template', or spans"):
        words.aggregate("word")
    with pytest.raises(MoejaxError, match="holds tokens of prompt and answer; split it at token 5"):
        make_result().aggregate([(4, 6)])


def test_the_report_of_words_is_that_of_the_result_in_words():
    from moejax.report.merge import merge_report, word_spans

    result = make_result()
    spans = word_spans(result.pieces, result.prompt_length)
    found, want = merge_report(result.to_dict(), spans), result.aggregate().to_dict()
    for name in ("tokens", "token_ids", "prompt_length", "expert_ids"):
        assert found[name] == want[name]
    for one, other in zip(found["targets"], want["targets"], strict=True):
        assert one["position"] == other["position"]
        for name in ("tokens", "layers", "experts", "heads"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one["edges"]["2"], other["edges"]["2"], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(("kind", "index"), [("tokens", ()), ("layers", ("layer",)), ("heads", ("layer", "head"))])
def test_a_table_has_a_row_for_each_number(kind, index):
    result = make_result()
    table, values = result.to_frame(kind), np.asarray(getattr(result, kind))
    assert len(table) == values.size
    assert {"target", "label", "token", "piece", "token_id", "part", "relevance", *index} == set(table)
    row = table.iloc[len(table) - 2]
    place = [
        row[name]
        for name in ("target", *[n for n in index if n == "layer"], "token", *[n for n in index if n == "head"])
    ]
    assert row["relevance"] == values[tuple(place)]
    assert set(table["piece"]) == {*result.pieces[:4], "\\ud83d", *result.pieces[5:]}, "tables hold valid text"
    assert (row["piece"], row["label"], row["part"]) == (result.pieces[row["token"]], "' y'", "answer")


def test_a_table_of_experts_sums_to_by_expert():
    result = make_result()
    table = result.to_frame("experts")
    assert len(table) == N * (L - 1) * T * K, "layers without experts have no rows"
    sums = table.groupby(["target", "layer", "expert"])["relevance"].sum()
    by_expert = result.by_expert()
    for (n, layer, expert), value in sums.items():
        np.testing.assert_allclose(value, by_expert[n, layer, expert], rtol=1e-5, atol=1e-6)
    assert set(table["slot"]) == set(range(K))
    with pytest.raises(MoejaxError, match="kind='expert' is unknown; choose from tokens, experts, heads, layers"):
        result.to_frame("expert")


def test_a_table_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MoejaxError, match="to_frame needs pandas, which is not installed: pip install pandas"):
        make_result().to_frame()


# ------------------------------------------------------------------------------------------------ pages


def test_a_result_shows_its_page(explained):
    output = explained._repr_html_()
    assert output.count("<iframe") == 1
    assert "srcdoc=" in output
    assert explained.prompt_length == len(PROMPT)
    assert len(explained.pieces) == len(PROMPT) + 1, "nothing reads the last token of the answer"
    target = explained.to_dict()["targets"][1]
    np.testing.assert_allclose(target["edges"]["0"], explained.vectors["edges.0"][1])


def test_scales_of_show(explained, capsys):
    explained.show(scale="sqrt")
    assert "ledger" in capsys.readouterr().out
    assert explained.show(plot="matrix", scale="sqrt").axes
    with pytest.raises(MoejaxError, match="scale='log' is unknown; choose from linear, sqrt"):
        explained.show(scale="log")
