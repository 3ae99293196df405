"""The bundled text sample and the settings that train on it."""

import json
from pathlib import Path

import numpy as np
import pytest

from moejax import MoejaxError
from moejax.checkpoints.folder import BUNDLED
from moejax.training import Run, TrainConfig
from moejax.training.texts import find_text, read_texts

NAMES = {"sotu", "shakespeare", "austen"}


@pytest.mark.fast
def test_texts() -> None:
    texts, labels = read_texts(find_text("sample"))
    assert set(labels) == NAMES
    sizes = {name: sum(len(text) for text, label in zip(texts, labels, strict=True) if label == name) for name in NAMES}
    assert min(sizes.values()) > 80_000
    assert sum(sizes.values()) < 300_000


def test_settings(tmp_path: Path) -> None:
    """The held-out share has all domains and no document that is trained on."""
    config = TrainConfig.read(BUNDLED / "sample.json")
    run = Run(config, tmp_path)
    train, heldout = run.corpora
    assert set(heldout.domains) == {0, 1, 2} == set(train.domains)
    texts, labels = read_texts(find_text("sample"))
    last = sum(len(run.tokenizer.encode(text, special=False)) + 1 for text in texts[-len(NAMES) :])
    assert set(labels[-len(NAMES) :]) == NAMES
    assert len(heldout.tokens) <= last
    assert config.architecture(run.vocab_size).num_experts == 8


@pytest.mark.fast
def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_text("sample") == BUNDLED / "sample.jsonl"
    Path("sample").write_text("mine")
    assert read_texts(find_text("sample")) == (["mine"], [None])


@pytest.mark.fast
def test_no_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoejaxError, match=r"samples: no such file.*'sample'"):
        read_texts(find_text("samples"))


def test_analysed_by_domain() -> None:
    import moejax
    from moejax.study import Documents

    found = Documents.read("sample", moejax.load("tiny-olmoe"))
    assert set(found.names) == NAMES
    assert len(found.tokens) == len(found.labels) == 24
    lines = (BUNDLED / "sample.jsonl").read_text("utf-8").splitlines()
    assert [found.names[i] for i in np.asarray(found.labels)] == [json.loads(line)["label"] for line in lines]
