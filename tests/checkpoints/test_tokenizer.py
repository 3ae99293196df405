"""Every tokenizer that a folder can have is read as transformers reads it; pieces and names are a reader's."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.tokenizers import byte_level, llama_form

from moejax.checkpoints.tokenizer import Tokenizer
from moejax.errors import CheckpointError, PromptError

SPACED = "The capital of France is Paris"


@pytest.fixture(scope="module", params=["llama", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(llama_form() if request.param == "llama" else byte_level([SPACED, "and the happiness of it"], 400))


def write(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufffd<>"), max_size=30))
def test_pieces_join_to_the_text(text: str) -> None:
    for tokenizer in (Tokenizer(llama_form()), Tokenizer(byte_level([SPACED]))):
        ids = tokenizer.encode(text, special=False)
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)


def test_bytes_of_a_character_stay_together(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces(tokenizer.encode("is \N{EURO SIGN}\N{CAT FACE} is", special=False))
    assert "\ufffd" not in "".join(pieces)
    assert "\N{EURO SIGN}" in pieces or " \N{EURO SIGN}" in pieces
    assert pieces.count("") == 5  # three and four bytes, the first of each with the character


@pytest.mark.parametrize("word", [" Paris", " France", " is"])
def test_a_word_is_named_as_it_stands_in_a_text(tokenizer: Tokenizer, word: str) -> None:
    whole = tokenizer.encode(SPACED)
    token = tokenizer.token_id(word)
    assert token in whole
    assert tokenizer.token_texts([token]) == [word]


def test_a_continuation_has_a_space_only_if_it_says_so(tokenizer: Tokenizer) -> None:
    before = tokenizer.encode("and the happi", special=False)
    for end in ("ness", " ness", "ness of it", " Paris is"):
        assert tokenizer.decode([*before, *tokenizer.continuation(end)]) == "and the happi" + end


def test_several_tokens_are_shown_as_they_stand() -> None:
    with pytest.raises(PromptError, match=r"'qx' is 2 tokens, not one: 'q', 'x'"):
        Tokenizer(llama_form()).token_id("qx")


def test_one_start_token(tokenizer: Tokenizer) -> None:
    llama = Tokenizer(llama_form())
    assert llama.encode("<s>The")[:2] == llama.encode("The")[:2]
    assert llama.encode("<s>The").count(1) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                "290": {"content": "<|im_start|>", "special": True, "lstrip": False, "rstrip": False},
            },
        },
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "unk_token": "<unk>"},
    ],
    ids=["generic", "added tokens", "class of its own"],
)
def test_as_transformers_reads_it(config: dict[str, Any], tmp_path: Path) -> None:
    backend = byte_level([SPACED] * 3) if "added_tokens_decoder" in config else llama_form()
    if "added_tokens_decoder" in config:
        tokens = config["added_tokens_decoder"]
        config = config | {"added_tokens_decoder": {str(backend.get_vocab_size()): tokens["290"]}}
    folder = write(tmp_path, backend, **config)
    ours, reference = Tokenizer.from_folder(folder), theirs(folder)
    assert ours is not None
    for text in (SPACED, "<|im_start|>The capital", " is  Paris.", "<s>The"):
        want = reference(text).input_ids
        got = ours.encode(text)
        assert got == want or (text.startswith("<s>") and got == want[1:])  # one start token, not two
        assert ours.decode(got) == reference.decode(got, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_sentencepiece_alone(tmp_path: Path) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([SPACED, "the cat sat on the mat", "abcdefghijklmnopqrstuvwxyz"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=90, model_type="bpe", minloglevel=2
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.encode("the capital", special=False) == model.encode("the capital")
    assert "".join(ours.pieces(ours.encode(SPACED, special=False))).strip() == SPACED


def test_vocabulary_and_merges_alone(tmp_path: Path) -> None:
    backend = byte_level([SPACED] * 3)
    backend.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None
    assert ours.encode("capital of") == backend.encode("capital of").ids


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "model"
    inner.mkdir()
    llama_form().save(str(tmp_path / "secret.json"))
    (inner / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"a link out of its folder, to .*secret.json"):
        Tokenizer.from_folder(inner)


class Letters:
    """A tokenizer of somebody's own, with the two methods that are needed."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 96 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 96) for i in ids)


def test_any_object_is_a_tokenizer() -> None:
    tokenizer = Tokenizer.wrap(Letters())
    assert tokenizer.encode("abc") == [1, 2, 3]
    assert tokenizer.pieces([3, 2]) == ["c", "b"]
    assert Tokenizer.wrap(tokenizer) is tokenizer
    with pytest.raises(PromptError, match="object is no tokenizer"):
        Tokenizer.wrap(object())


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode("a\udcff b")
