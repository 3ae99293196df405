"""A tiny model folder with a tokenizer, and the command run in this process or in its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

TEXT = ["the cat sat on the mat and the dog sat on the cat", "a dog and a cat", "where is the mat of the dog"] * 3


class Outcome(NamedTuple):
    """Exit code and output of a run of the command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_folder(toy_config: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random toy model with a byte-level tokenizer. Do not change it."""
    import jax
    from tiny.tokenizers import byte_level

    from moejax.checkpoints import save_folder
    from moejax.models import Decoder, family

    folder = tmp_path_factory.mktemp("cli") / "toy"
    tokenizer = byte_level(TEXT)
    config = toy_config | {"vocab_size": tokenizer.get_vocab_size()}
    decoder = Decoder.init(family("olmoe").config(config), jax.random.key(0))
    decoder = jax.tree.map(lambda p: p if p.ndim == 1 else 10 * p, decoder)
    save_folder(decoder, config, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def moejax_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``moejax ARGUMENTS`` in this process."""

    def run(*arguments: object) -> Outcome:
        from moejax.cli import run as run_command

        monkeypatch.setattr(sys, "argv", ["moejax", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "60")
        capsys.readouterr()
        try:
            run_command()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def moejax_process() -> Callable[..., Outcome]:
    """Runs ``moejax ARGUMENTS`` in a process of its own."""

    def run(*arguments: object) -> Outcome:
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, "-c", "from moejax.cli import main; main()", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": root, "COLUMNS": "60"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
