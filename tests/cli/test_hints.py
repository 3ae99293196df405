"""Hints where a person could not know: lists, the option that is missing, files that are not there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast


def test_models_are_listed(moejax_command: Callable) -> None:
    found = json.loads(moejax_command("models", "--json").out)
    assert "tiny-olmoe" in found["bundled"]
    assert {"olmoe", "mixtral"} <= {*found["families"]}
    assert "olmoe-1b-7b" in found["shapes"]
    assert "tiny-olmoe" in moejax_command("models").out


def test_bench_of_a_shape_names_the_option(moejax_command: Callable) -> None:
    code, out, err = moejax_command("bench", "olmoe")
    assert (code, out) == (1, "")
    assert err.endswith("use: moejax bench olmoe-1b-7b --random\n")


def test_a_plugin_that_is_not_there(moejax_command: Callable) -> None:
    said = moejax_command("models", "--plugin", "nofile.py")
    assert said == (1, "", "moejax: --plugin nofile.py: no such file.\n")


def test_convert_that_is_interrupted(moejax_command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moejax.cli.checkpoints.use_host_only", lambda: None)
    monkeypatch.setattr("moejax.convert", press)
    said = moejax_command("convert", "tiny-olmoe", tmp_path / "converted")
    assert said == (130, "", "stopped; the same command goes on with what is left\n")


def test_completion_can_be_installed(moejax_command: Callable) -> None:
    assert "--install-completion" in moejax_command("--help").out
