"""A synthetic corpus that is easy to learn: most of the time the last token determines the next."""

import json
from pathlib import Path

import numpy as np
import pytest


def chain(count: int, vocab: int, seed: int) -> np.ndarray:
    """Tokens of a noisy cycle, without 0, which ends a document."""
    rng = np.random.default_rng(seed)
    step = rng.permutation(np.arange(2, vocab))
    follow = dict(zip(step, np.roll(step, 1), strict=True))
    tokens = [int(step[0])]
    for noise in rng.random(count - 1):
        tokens.append(int(follow[tokens[-1]]) if noise < 0.9 else int(rng.choice(step)))
    return np.array(tokens, np.uint16)


def write_corpus(folder: Path, vocab: int) -> None:
    """Write the files of scripts/prepare_corpus.py: tokens, the domains' names, a tokenizer."""
    from tiny.tokenizers import words

    for name, documents in (("train", 40), ("heldout", 4)):
        tokens = chain(documents * 90, vocab, seed=0)
        starts = np.arange(0, len(tokens), 90)
        tokens[starts[1:] - 1] = 0
        domains = (np.arange(documents) % 2).astype(np.int8)
        np.savez(folder / f"{name}.npz", tokens=tokens, doc_starts=starts, doc_domain=domains)
    (folder / "corpus.json").write_text(json.dumps({"domains": [{"name": "odd"}, {"name": "even"}]}))
    tokenizer = words(vocab, {0: "<end>", 1: "<pad>", 2: "<unknown>"}, unknown=2)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in the format of scripts/prepare_corpus.py, in the toy vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 53)
    return folder
