"""Prompts from arguments, standard input, files and chats; and answers that are shown while they are generated."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)
PROMPT = "the cat sat on the"
MESSAGES = [{"role": "user", "content": "where is the mat"}]


@pytest.fixture(scope="module")
def chat_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a chat template."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("chat") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture
def run(moejax_command: Callable, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command on the model, with a text as standard input."""

    def run(command: str, *arguments: Any, stdin: str = "") -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        more = ("--max-new-tokens", 6) if command == "generate" else ()
        return moejax_command(command, *arguments, "-m", chat_folder, *more)

    return run


def lines(outcome: Any) -> list[dict]:
    assert (outcome.code, outcome.err) == (0, "")
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.mark.fast
def test_version(moejax_command: Callable) -> None:
    import moejax

    assert moejax_command("--version").out == f"moejax {moejax.__version__}\n"


def test_several_prompts_are_lines_of_json(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "a dog"}\n{"text": "where is"}\n')
    given = ("generate", "-", PROMPT, "--data", tmp_path / "more.jsonl")
    found = lines(run(*given, "--json", stdin="the mat\n"))
    assert [line["prompt"] for line in found] == ["the mat", PROMPT, "a dog", "where is"]
    assert found[1] == lines(run("generate", PROMPT, "--json"))[0]
    shown = run(*given, stdin="the mat\n").out
    assert shown == "\n".join(f"{line['prompt']}{line['text']}\n" for line in found)
    reports = lines(run("explain", PROMPT, "a dog", "--json"))
    assert [report["prompt"] for report in reports] == [PROMPT, "a dog"]
    assert run("explain", PROMPT, "a dog").out.count("ledger:") == 2


def test_a_chat(run: Callable, tmp_path: Path) -> None:
    file, page = tmp_path / "chat.json", tmp_path / "page.html"
    file.write_text(json.dumps({"messages": MESSAGES, "temperature": 1}))
    (answer,) = lines(run("generate", "--chat", file, "--json"))
    assert answer["messages"] == MESSAGES
    assert run("generate", "--chat", "-", stdin=json.dumps(MESSAGES)).out == f"{answer['text']}\n"

    (report,) = lines(run("explain", "--chat", file, "--json"))
    assert "".join(report["tokens"]) == "[user] where is the mat\n[assistant]"
    shown = run("explain", "--chat", file, "--html", page).out
    assert "[template]" in shown
    assert "[template]" in page.read_text("utf-8")
    assert "[template]" not in run("explain", "--chat", file, "--all-tokens").out


def test_streams_and_stops(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("generate", PROMPT).out
    assert run("generate", PROMPT, "--stream").out == whole
    end = whole.removeprefix(PROMPT)[2:4]
    stopped = run("generate", PROMPT, "--stop", end, "--stop", "never").out
    assert end in stopped.removeprefix(PROMPT)
    assert len(stopped) < len(whole)
    assert run("generate", PROMPT, "--stream", "--stop", end).out == stopped
    drawn = {run("generate", PROMPT, "--sample", "--seed", seed).out for seed in (0, 1)}
    assert len(drawn) == 2

    pieces = []
    monkeypatch.setattr("moejax.cli.explaining._stream", lambda *given: pieces.append(given))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run("generate", PROMPT)
    assert len(pieces) == 1, "on a terminal without being asked"


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        ([], "", "give a prompt"),
        (["a cat", "--chat", "-"], "[]", "--chat excludes other prompts"),
        (["--chat", "-"], "[]", "standard input: a chat is a list of messages"),
        (["--chat", "-"], '{"role": "user"}', "a chat is a list of messages"),
        (["--chat", "-"], "hello", "not JSON"),
        (["--chat", "nowhere.json"], "", "nowhere.json: no such file"),
        (["--data", "nowhere.txt"], "", "nowhere.txt: no such file"),
        (["-"], "", "the prompt is empty"),
    ],
)
def test_what_is_no_prompt(run: Callable, arguments: list[str], stdin: str, words: str) -> None:
    said = run("generate", *arguments, stdin=stdin)
    assert (said.code, said.out) == (1, "")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def test_one_file_is_for_one_prompt(run: Callable, tmp_path: Path) -> None:
    said = run("explain", "a cat", "a dog", "--html", tmp_path / "page.html")
    assert said.code == 1
    assert "--html takes one prompt" in said.err
