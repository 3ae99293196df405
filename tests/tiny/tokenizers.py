"""Tiny tokenizers: words, bytes, and the form that Llama publishes."""

import string
from collections.abc import Iterable, Mapping
from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

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


@cache
def llama_form() -> tokenizers.Tokenizer:
    """A tokenizer in the form that Llama, Mixtral and JetMoE publish: a mark stands for a space, bytes for the rest.

    It knows the words of ``"The capital of France is Paris"`` and a few more; 1 begins every text.
    """
    mark = "\u2581"
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for letter in mark + string.ascii_letters + ".,":
        vocabulary[letter] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    words = ("The", "capital", "of", "France", "is", "Paris", "Rome", "and", "the", "happi")
    for word in (*(mark + word for word in words), "ness", "Paris"):
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend
