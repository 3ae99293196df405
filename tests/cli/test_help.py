"""Every command says what it does, and what its options mean, without loading a model."""

import pytest
import typer
from typer.testing import CliRunner

from moejax.cli import app

pytestmark = pytest.mark.fast

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert command in result.output


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(app, ["explian"])
    assert result.exit_code == 2
