"""The ``moejax`` command: data where a program reads it, one line where a person made a mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

L, H, E, K = 2, 8, 9, 5
PROMPT = "the cat sat on the"


@pytest.fixture
def broken(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, to break."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


def assert_one_line(outcome: tuple[int, str, str], *words: str) -> None:
    """It failed, and said why in one line that names every word."""
    code, out, err = outcome
    assert code == 1
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("moejax: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_help_names_every_subcommand(moejax_command: Callable) -> None:
    code, out, _ = moejax_command("--help")
    assert code == 0
    assert "explain" in out
    assert "generate" in out


@pytest.mark.parametrize("command", ["explain", "generate"])
def test_help_of_a_subcommand(command: str, moejax_command: Callable) -> None:
    code, out, _ = moejax_command(command, "--help")
    assert code == 0
    assert "--model" in out
    assert "--json" in out


def test_generate(moejax_command: Callable, model_folder: Path) -> None:
    code, out, err = moejax_command("generate", PROMPT, "--model", model_folder, "--max-new-tokens", 6)
    assert (code, err) == (0, "")
    assert out.startswith(PROMPT)
    assert len(out.strip()) > len(PROMPT)


def test_generate_json_is_what_the_library_generates(moejax_command: Callable, model_folder: Path) -> None:
    import moejax

    code, out, err = moejax_command("generate", PROMPT, "-m", model_folder, "--max-new-tokens", 6, "--json")
    assert (code, err) == (0, "")
    text = moejax.load(model_folder).generate(PROMPT, max_new_tokens=6)
    assert json.loads(out) == {"prompt": PROMPT, "text": text}


def test_generate_options_reach_the_sampler(moejax_command: Callable, model_folder: Path) -> None:
    arguments = ("generate", PROMPT, "-m", model_folder, "--max-new-tokens", 6, "--json", "--temperature", 1.5)
    texts = {json.loads(moejax_command(*arguments, "--seed", seed).out)["text"] for seed in (0, 1, 0)}
    assert len(texts) == 2


def check_report(report: dict, tokens: int, targets: int) -> None:
    assert len(report["tokens"]) == len(report["token_ids"]) == tokens
    assert np.shape(report["expert_ids"]) == np.shape(report["expert_weights"]) == (L, tokens, K)
    assert report["num_experts"] == E
    assert len(report["targets"]) == targets
    for target in report["targets"]:
        assert np.shape(target["tokens"]) == (tokens,)
        assert np.shape(target["layers"]) == (L + 1, tokens)
        assert np.shape(target["experts"]) == (L, tokens, K)
        assert np.shape(target["heads"]) == (L, tokens, H)
        assert abs(target["ledger"]["residual"]) <= 1e-4 * max(1, abs(target["value"]))
        assert target["candidates"][0]["logit"] >= target["candidates"][-1]["logit"]


def length(folder: Path, text: str) -> int:
    from moejax.checkpoints.tokenizer import Tokenizer

    return len(Tokenizer.from_folder(folder).encode(text))


def test_explain_json(moejax_command: Callable, model_folder: Path) -> None:
    code, out, err = moejax_command("explain", PROMPT, "--model", model_folder, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    check_report(report, length(model_folder, PROMPT), 1)
    assert report["prompt"] == PROMPT
    assert "".join(report["tokens"]) == PROMPT


@pytest.mark.parametrize("rule", ["attnlrp-uniform", "cplrp", "plain"])
def test_explain_rules(rule: str, moejax_command: Callable, model_folder: Path) -> None:
    code, out, _ = moejax_command("explain", PROMPT, "-m", model_folder, "--json", "--rule", rule)
    assert code == 0
    report = json.loads(out)
    check_report(report, length(model_folder, PROMPT), 1)
    assert report["rule"].lower().startswith(rule.partition("-")[0])
    assert ("uniform" in report["rule"]) == ("uniform" in rule)


def test_explain_target_and_contrast(moejax_command: Callable, model_folder: Path) -> None:
    options = ("explain", PROMPT, "-m", model_folder, "--json")

    def value(*extra):
        return json.loads(moejax_command(*options, *extra).out)["targets"][0]["value"]

    cat, dog = value("--target", " cat"), value("--target", " dog")
    assert value("--target", " cat", "--contrast", " dog") == pytest.approx(cat - dog, abs=1e-4)


def test_explain_answer_has_a_target_for_each_token(moejax_command: Callable, model_folder: Path) -> None:
    code, out, _ = moejax_command("explain", PROMPT, "-m", model_folder, "--json", "--answer", " mat and")
    assert code == 0
    answer = length(model_folder, " mat and")
    assert answer == 2
    check_report(json.loads(out), length(model_folder, PROMPT) + answer - 1, answer)


def test_explain_generated(moejax_command: Callable, model_folder: Path) -> None:
    code, out, _ = moejax_command("explain", PROMPT, "-m", model_folder, "--json", "--generate", 3)
    assert code == 0
    check_report(json.loads(out), length(model_folder, PROMPT) + 2, 3)


def test_explain_prints_text_and_writes_a_page(moejax_command: Callable, model_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = moejax_command("explain", PROMPT, "-m", model_folder, "--html", page)
    assert (code, err) == (0, "")
    assert "cat" in out
    html = page.read_text(encoding="utf-8")
    assert html.lstrip().lower().startswith("<!doctype html")
    assert "cat" in html


def test_explain_json_and_page_together(moejax_command: Callable, model_folder: Path, tmp_path: Path) -> None:
    code, out, _ = moejax_command("explain", PROMPT, "-m", model_folder, "--json", "--html", tmp_path / "page.html")
    assert code == 0
    assert json.loads(out)["rule"]
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("command", ["explain", "generate"])
def test_folder_without_config(command: str, moejax_command: Callable, broken: Path) -> None:
    (broken / "config.json").unlink()
    assert_one_line(moejax_command(command, PROMPT, "--model", broken), "config.json", str(broken))


@pytest.mark.parametrize("command", ["explain", "generate"])
def test_truncated_weights(command: str, moejax_command: Callable, broken: Path) -> None:
    weights = broken / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    assert_one_line(moejax_command(command, PROMPT, "--model", broken), "truncated", "model.safetensors")


def test_unknown_model_type(moejax_command: Callable, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert_one_line(moejax_command("explain", PROMPT, "--model", broken), "gpt2", "olmoe")


def test_config_that_is_no_json(moejax_command: Callable, broken: Path) -> None:
    (broken / "config.json").write_text("{\n  'no': json\n}")
    assert_one_line(moejax_command("explain", PROMPT, "--model", broken), "config.json")


def test_broken_tokenizer(moejax_command: Callable, broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{\n")
    assert_one_line(moejax_command("explain", PROMPT, "--model", broken), "tokenizer.json")


def test_no_tokenizer(moejax_command: Callable, broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    assert_one_line(moejax_command("explain", PROMPT, "--model", broken), "has no tokenizer")


def test_tokenizer_of_another_model(moejax_command: Callable, broken: Path) -> None:
    """An id behind the end of the embedding is refused, not clamped to its last row."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    tensors = load_file(broken / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:20].copy()
    save_file(tensors, broken / "model.safetensors")
    assert_one_line(moejax_command("explain", PROMPT, "--model", broken), "vocabulary of 20")


BAD = {
    "empty prompt": (["explain", ""], ["empty"]),
    "empty prompt to continue": (["generate", ""], ["empty"]),
    "target of several tokens": (["explain", PROMPT, "--target", " unheard of"], ["unheard of", "tokens, not one"]),
    "contrast of several tokens": (
        ["explain", PROMPT, "--target", " cat", "--contrast", " unheard of"],
        ["unheard of", "tokens, not one"],
    ),
    "empty target": (["explain", PROMPT, "--target", ""], ["no tokens"]),
    "empty answer": (["explain", PROMPT, "--answer", ""], ["answer is empty"]),
    "contrast without target": (["explain", PROMPT, "--contrast", " cat"], ["--contrast needs --target"]),
    "two kinds of target": (["explain", PROMPT, "--target", " cat", "--generate", 3], ["--target", "--generate"]),
    "contrast with an answer": (["explain", PROMPT, "--contrast", " cat", "--answer", " dog"], ["--contrast"]),
    "unknown rule": (["explain", PROMPT, "--rule", "magic"], ["magic", "attnlrp", "cplrp", "plain"]),
    "negative number of tokens": (["explain", PROMPT, "--generate", -2], ["-2"]),
    "negative temperature": (["generate", PROMPT, "--temperature", -1], ["temperature"]),
    "top_p above one": (["generate", PROMPT, "--top-p", 1.5], ["top_p"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments: list, words: list[str], moejax_command: Callable, model_folder: Path) -> None:
    assert_one_line(moejax_command(*arguments, "--model", model_folder), *words)


def test_seed_that_jax_would_cut(moejax_command: Callable, model_folder: Path) -> None:
    code, _, err = moejax_command("generate", PROMPT, "--model", model_folder, "--seed", 2**32)
    assert code == 2
    assert "--seed" in err


@pytest.mark.parametrize("page", ["nowhere/page.html", "."])
def test_page_that_cannot_be_written(page: str, moejax_command: Callable, model_folder: Path, tmp_path: Path) -> None:
    outcome = moejax_command("explain", PROMPT, "--model", model_folder, "--html", tmp_path / page)
    assert_one_line(outcome, str(tmp_path / page))


def test_model_that_is_nowhere(moejax_command: Callable) -> None:
    """The test session is offline, so the hub cannot be asked."""
    assert_one_line(moejax_command("explain", PROMPT, "--model", "no-such/model"), "no-such/model")


def test_process_prints_json(moejax_process: Callable, model_folder: Path) -> None:
    code, out, err = moejax_process("generate", PROMPT, "-m", model_folder, "--max-new-tokens", 2, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["prompt"] == PROMPT


def test_process_prints_one_line_for_an_unknown_model_when_offline(moejax_process: Callable) -> None:
    assert_one_line(moejax_process("explain", PROMPT, "--model", "no-such-org/no-such-model"), "no-such-org")


def test_process_prints_one_line_for_a_missing_config(moejax_process: Callable, tmp_path: Path) -> None:
    assert_one_line(moejax_process("explain", PROMPT, "--model", tmp_path), "config.json")
