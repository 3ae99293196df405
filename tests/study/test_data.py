"""Reading data, and cutting it into batches: every token once, beside the one that follows it."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moejax import LM, MoejaxError, PromptError
from moejax.study import Documents, Windows

pytestmark = pytest.mark.fast

SIZES = (70, 5, 0, 33, 1, 40)


@pytest.fixture(scope="module")
def documents() -> Documents:
    starts = np.cumsum([0, *SIZES])
    tokens = [np.arange(a, b) for a, b in pairwise(starts)]
    return Documents(tokens, np.array([0, 1, 1, 2, 0, 1]), ("a", "b", "c"))


@pytest.fixture
def worded(toy_lm: LM) -> LM:
    """The toy model with a tokenizer of one token a word: its length."""
    tokenizer: Any = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()])
    lm = LM(toy_lm.decoder, None, "toy")
    object.__setattr__(lm, "need_tokenizer", lambda: tokenizer)
    return lm


@pytest.mark.parametrize(("length", "batch"), [(16, 4), (33, 1), (128, 5)])
def test_every_token_once(documents: Documents, length: int, batch: int) -> None:
    windows = Windows(documents, length, batch)
    batches = list(windows)
    assert len(batches) == len(windows)
    assert windows.num_tokens == documents.num_tokens == sum(SIZES)
    seen, predicted, owner = [], [], np.repeat(np.arange(len(SIZES)), SIZES)
    for found in batches:
        tokens, targets, valid, has, labels = map(np.asarray, found)
        assert tokens.shape == targets.shape == valid.shape == has.shape
        assert tokens.shape[0] == batch
        assert tokens.shape[1] <= length
        assert not (has & ~valid).any()
        np.testing.assert_array_equal(targets[has], tokens[has] + 1)
        np.testing.assert_array_equal(owner[targets[has]], owner[tokens[has]], err_msg="stays in its document")
        np.testing.assert_array_equal(labels[np.nonzero(valid)[0]], documents.labels[owner[tokens[valid]]])
        seen += tokens[valid].tolist()
        predicted += targets[has].tolist()
    assert sorted(seen) == list(range(sum(SIZES)))
    firsts = np.cumsum([0, *SIZES])[:-1]
    assert sorted(predicted) == sorted(set(range(sum(SIZES))) - set(firsts.tolist()))


def test_a_limit_draws_windows(documents: Documents) -> None:
    drawn = [Windows(documents, 8, 3, limit=40, seed=seed) for seed in (0, 0, 1)]
    tokens = [{int(t) for b in windows for t in np.asarray(b.tokens)[np.asarray(b.valid)]} for windows in drawn]
    assert all(40 <= windows.num_tokens < 48 for windows in drawn)
    assert tokens[0] == tokens[1] != tokens[2]
    assert Windows(documents, 8, limit=10**6).num_tokens == sum(SIZES)


@pytest.mark.parametrize("option", ["length", "batch", "limit"])
def test_sizes_must_be_positive(documents: Documents, option: str) -> None:
    with pytest.raises(MoejaxError, match=f"{option}=0"):
        Windows(documents, **{option: 0})


def test_text_is_one_document(worded: LM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one three\n\nfifteen", "utf-8")
    found = Documents.read(tmp_path / "a.txt", worded)
    assert [t.tolist() for t in found.tokens] == [[3, 5, 7]]
    assert found.names == ()


def test_lines_have_labels(worded: LM, tmp_path: Path) -> None:
    lines = [
        {"text": "one\u2028two", "label": "x"},
        {"text": "three"},
        {"text": "", "label": 7},
        {"text": "a", "label": "x"},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    found = Documents.read(tmp_path / "a.jsonl", worded)
    assert [t.tolist() for t in found.tokens] == [[3, 3], [5], [], [1]]
    assert [found.names[i] for i in found.labels] == ["x", "none", "7", "x"]


def test_a_corpus_has_domains(toy_lm: LM, tmp_path: Path) -> None:
    arrays = {
        "tokens": np.arange(2, 12, dtype=np.uint16),
        "doc_starts": np.array([0, 4]),
        "doc_domain": np.array([3, 1]),
    }
    np.savez(tmp_path / "c.npz", **arrays)
    found = Documents.read(tmp_path / "c.npz", toy_lm)
    assert [t.tolist() for t in found.tokens] == [[2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [found.names[i] for i in found.labels] == ["domain 3", "domain 1"]
    (tmp_path / "corpus.json").write_text(json.dumps({"domains": [{"name": n} for n in "pqrs"]}), "utf-8")
    found = Documents.read(tmp_path / "c.npz", toy_lm)
    assert [found.names[i] for i in found.labels] == ["s", "q"]
    (tmp_path / "corpus.json").write_text('{"domains": [1, 1, 1, 1]}', "utf-8")
    with pytest.raises(MoejaxError, match=r"corpus\.json"):
        Documents.read(tmp_path / "c.npz", toy_lm)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", b"  \n", "no tokens"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", b'{"label": "a"}', 'line 1: not an object with a string "text"'),
        ("a.jsonl", b"[]", "line 1: not an object"),
        ("a.npz", b"junk", "not a prepared corpus"),
        ("a.npz", b"", "not a prepared corpus"),
    ],
)
def test_bad_files(worded: LM, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoejaxError, match=words) as raised:
        Documents.read(tmp_path / name, worded)
    assert "\n" not in str(raised.value)


def test_what_does_not_fit_the_model(toy_lm: LM, tmp_path: Path) -> None:
    with pytest.raises(MoejaxError, match="no such file"):
        Documents.read(tmp_path / "missing.txt", toy_lm)
    np.savez(tmp_path / "c.npz", tokens=np.array([2, 53]), doc_starts=np.array([0]), doc_domain=np.array([0]))
    with pytest.raises(PromptError, match="53 is outside the vocabulary"):
        Documents.read(tmp_path / "c.npz", toy_lm)
    (tmp_path / "a.txt").write_text("text", "utf-8")
    with pytest.raises(PromptError, match="has no tokenizer"):
        Documents.read(tmp_path / "a.txt", toy_lm)
