"""Compiled programs are kept from run to run, where the user wants and can; who waits for one is told."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import moejax
from moejax.cli import compiling
from moejax.compilation_cache import SETTING, keep_programs
from moejax.program import fast_tracing

pytestmark = pytest.mark.fast


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of one's own; JAX's settings are as before when it is over."""
    names = [
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(SETTING)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept(home: Path) -> None:
    folder = keep_programs(small=True)
    assert folder is not None
    assert folder.parent == home / "moejax" / "xla"
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert keep_programs() == folder


def test_load_keeps_what_takes_a_second_to_compile(home: Path) -> None:
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    moejax.load("tiny-olmoe")
    assert jax.config.jax_compilation_cache_dir.startswith(str(home))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before > 0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.jit(lambda x: x * 2 + 1)(1.0)
    assert list(home.rglob("*-cache")), "programs are kept although others were compiled before"


def test_one_setting_turns_it_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "off")
    assert keep_programs() is None
    assert not home.exists()


def test_the_users_own_place_stays(home: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", "/somewhere/else")
    assert keep_programs() == Path("/somewhere/else")
    assert not home.exists()


def test_a_folder_that_cannot_be_written_is_no_error(home: Path) -> None:
    home.write_text("a file in its place")
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_who_waits_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(compiling._COMPILED)
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    try:
        compiling.tell_of_compiling()
        jax.jit(lambda x: x + 1)(1.0)
        assert capsys.readouterr().err == "", "no program of a model"
        with fast_tracing:
            jax.jit(lambda x: x + 2)(1.0)
            jax.jit(lambda x: x + 3)(1.0)
        assert capsys.readouterr().err == "compiling (once for this length) ..\n"
    finally:
        logger.handlers, logger.level, logger.propagate = before


def test_doctor_tells_the_place(moejax_command: Callable) -> None:
    assert os.environ[SETTING] == "off", "tests leave the home folder alone"
    assert '"compilation_cache": null' in moejax_command("doctor", "--json").out
    assert "MOEJAX_COMPILATION_CACHE=off" in moejax_command("doctor").out
