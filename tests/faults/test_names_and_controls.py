"""Names, labels and tokens of strangers are shown as they are: no markup is read, and no character acts or hides."""

import contextlib
import io
import json
import re
import shutil
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import moejax
from moejax import report
from moejax.checkpoints.doctor import examine
from moejax.checkpoints.folder import BUNDLED
from moejax.errors import one_line
from moejax.relevance import BASELINES
from moejax.report.checkpoints import doctor_tables, verification_table
from moejax.report.fit import fit_table
from moejax.report.scores import render_scores
from moejax.report.visible import escaped, printed, visible
from moejax.study.fit import Work, fit

BAD = (
    "\x1b\x07\x00\x08\x7f\x9b\r\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2060\u2066\u2069\ufeff\u00ad\u034f"
    "\u115f\u3164\uffa0\U000e0001\U000e0041\U000e007f\U000e0100\ud800"
)
"""Characters that act on a terminal, turn text around, or are not seen."""

BRACKETS = ["model[v2]", "a[", "a[/b]c", "[bold]x", "[link=https://x.example]y", "[/]", "\\[red]"]
HOSTILE = "\x1b]0;owned\x07\u202e\u200b\U000e0041"


def harmless(text: str) -> bool:
    return not set(BAD) & set(text)


class TestVisible:
    def test_characters_that_act_or_hide_are_named(self) -> None:
        for character in BAD:
            assert escaped(character) != character
            assert harmless(printed(f"a{character}b"))
        assert visible("\u202e\U000e0041\x1b") == "\\u202e\\U000e0041\\x1b"

    def test_all_that_has_ink_stays(self) -> None:
        text = "naïve 中文 नमस्ते \u0645\u06cc\u200c\u062e\u0648 👩\u200d🚀 ☀️ [b] \\ '"
        assert escaped(text) == printed(text) == text
        assert printed("a\n\tb") == "a\n\tb"
        assert visible("a\n\tb\r") == "a↵⇥b␍"
        assert (visible(""), escaped("")) == ("∅", "")

    def test_the_page_knows_the_same_characters(self) -> None:
        script = Path(report.__file__).parent.joinpath("page/basics.js").read_text("utf-8")
        wild = re.search(r"const wild = /(.*)/gu;", script)
        assert wild is not None
        # the escapes of the pattern as Python reads them; its categories are those of Python
        named = re.sub(r"\\p\{\w\w\}", "", wild[1]).replace("\\u{e0000}-\\u{e0fff}", "\U000e0000-\U000e0fff")
        categories = set(re.findall(r"\\p\{(\w\w)\}", wild[1]))
        assert categories == {"Cc", "Cf", "Cs", "Zl", "Zp"}
        for character in map(chr, [*range(0x300, 0x3200), 0xFFA0, 0xE0000, 0xE0FFF]):
            is_wild = bool(re.fullmatch(named, character)) or (
                unicodedata.category(character) in categories and character not in "\u200c\u200d"
            )
            assert is_wild == (escaped(character) != character), hex(ord(character))

    def test_errors_are_one_line_of_bounded_length(self) -> None:
        error = moejax.MoejaxError(f"{BAD}\n" + "x" * 10**6 + "the mend")
        assert str(error).isprintable()
        assert len(str(error)) <= 1200
        assert str(error).endswith("the mend")
        assert one_line("as it is") == "as it is"


def shown(draw: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=400, force_terminal=False)
    draw(console)
    return out.getvalue()


@pytest.mark.parametrize("name", [*BRACKETS, HOSTILE])
class TestNames:
    def test_doctor_and_verify(self, tmp_path: Path, name: str) -> None:
        facts = dict(examine("tiny-olmoe")) | {"model": name}
        facts["devices"] = [facts["devices"][0] | {"kind": name}]
        text = shown(lambda console: console.print(*doctor_tables(facts)))  # type: ignore[arg-type]
        assert text.count(escaped(name)) >= 2
        verified: Any = {
            "model": name,
            "dtype": "float32",
            "tokens": [2, 3],
            "relative_rms": 0.0,
            "max_difference": 0.0,
            "argmax_agreement": 1.0,
            "routing_agreement": [],
            "nonfinite": {name: 3},
            "versions": {"jax": name},
            "passed": True,
        }
        assert shown(lambda console: console.print(verification_table(verified))).count(escaped(name)) == 3

    def test_fit_and_scores(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        table = fit_table(fit("tiny-olmoe", "t4", work=Work(8, 1, 8)) | {"model": name})  # type: ignore[arg-type]
        assert escaped(name) in shown(lambda console: console.print(table))
        target = {"label": name, "gap": None, "tokens": [1.0], "experts": None}
        render_scores({"method": name, "unit": "logit", "tokens": [name], "targets": [target]})  # type: ignore[typeddict-item]
        assert escaped(name) in capsys.readouterr().out

    def test_explain(self, name: str) -> None:
        lm = moejax.load("tiny-olmoe")
        found = moejax.explain(replace(lm, name=name), "And the").to_dict()
        text = shown(lambda console: report.render(found, console))
        assert escaped(name) in text
        assert harmless(text)
        assert harmless(report.to_html(found).split("</title>")[0])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every token is an escape sequence and a mark that turns text around."""
    folder = Path(shutil.copytree(BUNDLED / "tiny-olmoe", tmp_path_factory.mktemp("hostile") / f"m{HOSTILE[:2]}[b]"))
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = {f"{HOSTILE}\u061c\ufeff{i}": i for i in range(1, size)} | {"go": 0}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "go"}}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    tokenizer |= dict.fromkeys(parts) | {"added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "go", "--max-new-tokens", "2", "--stream"],
        ["generate", "go", "--max-new-tokens", "2", "--no-stream"],
        ["explain", "go"],
        ["explain", "go", "--baseline", next(iter(BASELINES))],
        ["doctor"],
    ],
    ids=lambda arguments: " ".join(a for a in arguments if a != "go"),
)
def test_the_command_prints_no_control_characters(
    hostile: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moejax.cli import main

    model = [str(hostile)] if arguments[0] == "doctor" else ["--model", str(hostile)]
    monkeypatch.setattr(sys, "argv", ["moejax", *arguments, *model])
    with contextlib.suppress(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert harmless(out + err)
    assert "\\x1b" in out


def test_data_for_programs_keeps_every_character(hostile: Path) -> None:
    lm = moejax.load(hostile)
    found = moejax.explain(lm, [3, 5]).to_dict()
    assert HOSTILE in json.loads(json.dumps(found))["tokens"][0]
