"""What the command prints where the terminal is narrow, where it is none, and where nobody reads on."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from moejax import cli


def test_a_pipe_gets_whole_lines_and_a_narrow_table_whole_numbers(moejax_command: Callable, model_folder: Path) -> None:
    prompt = "where is the mat of the dog and the cat sat on the mat and a dog and"
    code, out, _ = moejax_command("explain", prompt, "-m", model_folder)
    assert code == 0
    lines = out.splitlines()
    assert sum("strongest tokens:" in line and line.count("@") == 5 for line in lines) == 1
    assert "…" not in out
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("top experts")) + 1 :]
    assert "layer" in table[1]
    assert max(map(len, table[:9])) <= 60


@pytest.mark.fast
def test_a_warning_is_a_line(
    moejax_command: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moejax.cli import show_warning

    monkeypatch.setattr(warnings, "showwarning", show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        warnings.warn("two\nlines", stacklevel=1)
    assert capsys.readouterr().err == "moejax: note: two lines\n"


@pytest.mark.fast
@pytest.mark.parametrize("told", [False, True])
def test_ctrl_c_is_a_word_and_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    ends = []

    def interrupted() -> None:
        """What typer does with a Ctrl-C, which a command has told of or not."""
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stop:
                raise typer.Exit(130) from None if told else stop
        except typer.Exit as end:
            sys.exit(end.exit_code)

    monkeypatch.setattr(cli, "run", interrupted)
    monkeypatch.setattr(os, "_exit", ends.append)
    cli.main()
    assert (ends, capsys.readouterr().err) == ([130], "" if told else "moejax: stopped\n")


def test_a_closed_pipe_is_no_error() -> None:
    root = str(Path(__file__).parents[2])
    for arguments in (["--version"], ["doctor", "--json"], ["doctor"], ["explain", "--help"]):
        reads, writes = os.pipe()
        os.close(reads)
        done = subprocess.run(
            [sys.executable, "-c", "from moejax.cli import main; main()", *arguments],
            env=os.environ | {"PYTHONPATH": root},
            stdout=writes,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        os.close(writes)
        assert (done.returncode, done.stderr) == (0, ""), arguments
