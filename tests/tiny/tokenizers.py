"""Tiny tokenizers: one whose token ``i`` is the word ``w{i}``, and one that knows every byte."""

from collections.abc import Iterable, Mapping
from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.checkpoints.tokenizer import Tokenizer


def words(count: int, special: Mapping[int, str] | None = None, unknown: int = 0) -> tokenizers.Tokenizer:
    """A tokenizer whose token ``i`` is the word ``w{i}``.

    Args:
        count: size of the vocabulary.
        special: tokens with other names.
        unknown: the token that stands for a word that is not in the vocabulary.
    """
    names = {i: f"w{i}" for i in range(count)} | dict(special or {})
    model = models.WordLevel({name: i for i, name in names.items()}, unk_token=names[unknown])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def text(ids: Iterable[int]) -> str:
    """The text that :func:`words` encodes as these tokens."""
    return " ".join(f"w{i}" for i in ids)


@cache
def word_tokenizer(count: int = 97) -> Tokenizer:
    """The tokenizer :func:`words` without special tokens, as moejax holds it."""
    return Tokenizer(words(count))


def byte_level(texts: Iterable[str], count: int = 290) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on texts, with at most ``count`` tokens; 0 ends a text, 1 pads."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=count, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend
