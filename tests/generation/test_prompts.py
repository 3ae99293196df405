"""Prompts in every form: chats, what tokenizers return, ids; and the options of generate under transformers' names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny.hugging_face import random_model
from tiny.tokenizers import byte_level

import moejax
from moejax import LM, Chat, MoejaxError, PromptError, explain
from moejax.generation import generate_tokens
from moejax.prompts import EncodedPrompt

TEMPLATE = (
    "<end>{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking %} <think>{% endif %}{% endif %}"
)
ASKED = [{"role": "system", "content": "be short"}, {"role": "user", "content": " what is a cat? "}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "<think>it has fur</think>an animal"}]
TEXT = "what is a cat? it is an animal with fur, be short"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer whose template begins with its start token, which the tokenizer adds too."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = byte_level([TEXT])
    tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    fields = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 24}
    sizes = {"intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    random_model(fields | sizes | {"max_position_embeddings": 128, "eos_token_id": None}, 0).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return moejax.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class TestForms:
    def test_all_forms_of_a_prompt_are_one(self, lm: LM, theirs: Any) -> None:
        ids = lm.encode("what is a cat?")
        encoded = theirs("what is a cat?")
        tensors = theirs("what is a cat?", return_tensors="pt")
        forms = (ids, np.array(ids), np.array(ids)[None], encoded, tensors, tensors["input_ids"], dict(encoded))
        assert all(lm.encode(form) == ids for form in forms)
        texts = {lm.generate(form, max_new_tokens=4) for form in ("what is a cat?", *forms)}
        assert len(texts) == 1

    def test_padding_is_taken_away(self, lm: LM, theirs: Any) -> None:
        theirs.pad_token = "<pad>"
        padded = theirs(["what is a cat?"], padding="max_length", max_length=40)
        assert lm.encode(padded) == lm.encode("what is a cat?")

    def test_a_list_is_several_prompts(self, lm: LM) -> None:
        one = lm.generate("what is a cat?", max_new_tokens=3)
        assert lm.generate(["what is a cat?"] * 2, max_new_tokens=3) == [one, one]
        assert lm.generate([ASKED, ANSWERED], max_new_tokens=3)[0] == lm.generate(ASKED, max_new_tokens=3)

    @pytest.mark.parametrize("prompt", [{"role": "user"}, np.ones((2, 3), int), [[1, 2], [3]], [{"role": "user"}, 3]])
    def test_what_is_no_prompt(self, lm: LM, prompt: Any) -> None:
        with pytest.raises(PromptError):
            explain(lm, prompt)


class TestChat:
    @pytest.mark.parametrize("messages", [ASKED, ANSWERED], ids=["asked", "answered"])
    def test_as_transformers_renders_it(self, lm: LM, theirs: Any, messages: Any) -> None:
        opens = messages[-1]["role"] != "assistant"
        want = theirs.apply_chat_template(messages, add_generation_prompt=opens)["input_ids"]
        assert lm.encode(messages) == want
        assert lm.encode(Chat(messages)) == want
        assert want.count(0) == 1
        # a text that the caller rendered has its start token already
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        assert lm.encode(rendered) == want

    def test_options_reach_the_template(self, lm: LM) -> None:
        thinking = lm.encode(Chat(ASKED, options={"enable_thinking": True}))
        assert "".join(lm.pieces(thinking)).endswith("[assistant] <think>")
        closed = lm.encode(Chat(ASKED, add_generation_prompt=False))
        assert "assistant" not in "".join(lm.pieces(closed))

    def test_roles(self, lm: LM) -> None:
        encoded = lm.encode(ANSWERED)
        assert encoded.roles is not None
        by_role: dict[str, str] = {}
        for piece, role in zip(lm.pieces(encoded), encoded.roles, strict=True):
            by_role[role] = by_role.get(role, "") + piece
        shown = {role: text.strip() for role, text in by_role.items()}
        assert shown.pop("template").startswith("<end>[system]")
        assert shown == {
            "system": "be short",
            "user": "what is a cat?",
            "reasoning": "it has fur",
            "answer": "an animal",
        }

    def test_a_part_by_role_is_a_target(self, lm: LM) -> None:
        encoded = lm.encode(ANSWERED)
        assert encoded.roles is not None
        relevance = explain(lm, ANSWERED, target=moejax.Role("answer"))
        places = [i for i, role in enumerate(encoded.roles) if role == "answer"]
        assert relevance.positions.tolist() == [place - 1 for place in places]
        logits = np.asarray(lm(list(encoded)))[0]
        want = [logits[place - 1, encoded[place]] for place in places]
        np.testing.assert_allclose(relevance.ledger.target, want, rtol=1e-4, atol=1e-5)
        with pytest.raises(PromptError, match="no token of this chat has the role 'tool'; there are template, system"):
            explain(lm, ANSWERED, target=moejax.Role("tool"))
        with pytest.raises(PromptError, match="only a chat has roles"):
            explain(lm, "a text", target=moejax.Role())

    def test_the_template_can_be_left_out_of_pictures(self, lm: LM, tmp_path: Path) -> None:
        relevance = explain(lm, ASKED, target=moejax.Generated(3))
        shown = relevance.aggregate("template")
        assert len(shown.pieces) < len(relevance.pieces)
        assert "[template]" in shown.pieces
        assert "assistant" not in "".join(shown.pieces[: shown.prompt_length])
        np.testing.assert_allclose(shown.tokens.sum(-1), relevance.tokens.sum(-1), rtol=1e-4, atol=1e-5)
        assert {*relevance.roles[relevance.prompt_length :]} == {"answer"}
        relevance.save(tmp_path / "rel")
        assert moejax.Relevance.load(tmp_path / "rel").roles == relevance.roles

    def test_errors_are_one_line(self, lm: LM, folder: Path) -> None:
        with pytest.raises(PromptError, match="a list of messages"):
            Chat([{"content": "no role"}])
        without = moejax.load(folder, tokenizer=lm.need_tokenizer().backend)
        with pytest.raises(PromptError, match="no chat template"):
            without.generate(ASKED)


class TestOptions:
    def test_names_of_transformers(self, lm: LM) -> None:
        ids = lm.encode("what is a cat?")
        want = lm.generate_ids([ids], max_new_tokens=6)
        assert lm.generate_ids([ids], max_length=len(ids) + 6, do_sample=False, use_cache=True) == want
        end = want[0][3]
        assert lm.generate_ids([ids], max_new_tokens=6, eos_token_id=end) == [want[0][: want[0].index(end)]]
        drawn = lm.generate_ids([ids], max_new_tokens=6, do_sample=True, seed=1)
        assert drawn == lm.generate_ids([ids], max_new_tokens=6, temperature=1.0, top_k=50, seed=1)
        assert lm.generate_ids([ids], max_new_tokens=1, bad_words_ids=[[want[0][0]]])[0] != want[0][:1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"do_smaple": True}, "did you mean 'do_sample'?"),
            ({"max_tokens": 3}, "did you mean 'max_"),
            ({"guidance": 3}, "known are "),
            ({"max_length": 2}, "leaves no room for an answer"),
            ({"use_cache": False}, "always keeps"),
            ({"do_sample": False, "temperature": 0.7}, "leave the temperature out"),
            ({"num_beams": 2, "stop_strings": ["a"]}, "beam search has no answer before its end"),
        ],
    )
    def test_what_is_refused(self, lm: LM, options: dict[str, Any], message: str) -> None:
        with pytest.raises(MoejaxError, match=message.replace("?", r"\?")):
            lm.generate("what is a cat?", **options)

    def test_stored_settings(self, folder: Path, tmp_path: Path) -> None:
        import shutil

        copy = Path(shutil.copytree(folder, tmp_path / "model"))
        plain = moejax.load(folder)
        prompt = plain.encode("what is a cat?")
        free = plain.generate_ids([prompt], max_new_tokens=8)[0]
        stored = {"eos_token_id": [5, free[4]], "pad_token_id": 1, "temperature": 0.6, "top_p": 0.8, "do_sample": True}
        (copy / "generation_config.json").write_text(json.dumps(stored))
        lm = moejax.load(copy)
        assert lm.eos_ids == (5, free[4])
        # the ends always hold, the settings of a draw only if one is asked for
        assert lm.generate_ids([prompt], max_new_tokens=8)[0] == free[: free.index(free[4])]
        assert lm.generate_ids([prompt], max_new_tokens=8, do_sample=True, seed=4, eos_ids=[]) == plain.generate_ids(
            [prompt], max_new_tokens=8, temperature=0.6, top_k=50, top_p=0.8, seed=4
        )

    def test_stop_strings(self, lm: LM) -> None:
        tokenizer, prompt = lm.need_tokenizer(), lm.encode("what is a cat?")
        row = lm.generate_ids([prompt], max_new_tokens=24)[0]
        stop = tokenizer.decode(row[9:12])
        assert stop
        cut = lm.generate_ids([prompt, prompt[:5]], max_new_tokens=24, stop_strings=[stop])[0]
        assert stop in tokenizer.decode(cut)
        assert stop not in tokenizer.decode(cut[:-1])
        assert cut == row[: len(cut)]

    def test_streams(self, lm: LM, theirs: Any) -> None:
        from transformers import TextStreamer

        want = lm.generate("what is a cat?", max_new_tokens=9)
        pieces: list[str] = []
        assert lm.generate("what is a cat?", max_new_tokens=9, streamer=pieces.append) == want
        assert len(pieces) > 3
        assert "".join(pieces) == want

        class Told(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                told.append(text)

        told: list[str] = []
        lm.generate(
            "what is a cat?", max_new_tokens=9, streamer=Told(theirs, skip_prompt=True, skip_special_tokens=True)
        )
        assert "".join(told) == want
        with pytest.raises(MoejaxError, match="one prompt's answer"):
            lm.generate(["a", "b"], streamer=pieces.append)

    def test_a_token_is_a_target(self, lm: LM) -> None:
        token = lm.need_tokenizer().token_id(" is")
        results = [explain(lm, "what is a cat?", target=target) for target in (" is", token, moejax.Token(" is"))]
        for result in results:
            assert result.labels == ["' is'"]
            np.testing.assert_array_equal(result.tokens, results[0].tokens)

    def test_forbidden_words_are_texts(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def spy(inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                asked.append(options["sampling"].bad_words)
                return inner(*args, **options)

            return call

        monkeypatch.setattr("moejax.lm.generate_tokens", spy(generate_tokens))
        lm.generate("what", max_new_tokens=2, bad_words=[" is", [3, 4]])
        tokenizer = lm.need_tokenizer()
        assert asked == [((tokenizer.token_id(" is"),), (3, 4))]


def test_a_tokenizer_of_ones_own(theirs: Any) -> None:
    from tiny.hugging_face import torch_model

    lm = moejax.load(torch_model("llama"), tokenizer=theirs)
    assert lm.encode("a") == theirs("a").input_ids
    assert isinstance(lm.encode("a"), EncodedPrompt)
