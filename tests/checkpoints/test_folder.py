"""A folder is found, and its ``config.json`` is parsed, once."""

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import moejax
from moejax.checkpoints import ModelFolder, find, load_folder, open_folder, read_config
from moejax.checkpoints.folder import FolderKind
from moejax.checkpoints.orbax import FORMAT
from moejax.errors import CheckpointError, ConfigError

from .compare import same_leaves
from .files import OLMOE, olmoe_shapes, random_tensors, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of Hugging Face files."""
    return write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    """The same model as ``moejax convert`` writes it."""
    moejax.convert(source, tmp_path / "converted", progress=False)
    return tmp_path / "converted"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that Python code opens from here on."""
    paths: list[Path] = []

    def counted(honest: Callable) -> Callable:
        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int):
                paths.append(Path(file))
            return honest(file, *args, **kwargs)

        return call

    # pathlib opens files by io.open
    monkeypatch.setattr(io, "open", counted(io.open))
    monkeypatch.setattr(builtins, "open", counted(builtins.open))
    return paths


def configs(opened: list[Path], folder: Path) -> int:
    """How often the ``config.json`` of a folder was opened."""
    return sum(path == folder / "config.json" for path in opened)


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("kind", ["source", "converted"])
def test_config_is_read_once_per_load(kind: str, mesh: bool, source: Path, converted: Path, opened: list[Path]) -> None:
    folder = source if kind == "source" else converted
    devices = jax.make_mesh((1,), ("expert",)) if mesh else None
    assert moejax.load(folder, mesh=devices).hugging_face == read_config(folder)
    assert configs(opened, folder) == 2, "once by load, once by read_config"


def test_config_is_read_once_by_whatever_takes_a_folder(
    source: Path, converted: Path, tmp_path: Path, opened: list[Path]
) -> None:
    runs: list[tuple[Path, Callable[[Path], object]]] = [
        (source, lambda folder: moejax.convert(folder, tmp_path / "again", progress=False)),
        (source, lambda folder: moejax.export(folder, tmp_path / "exported", progress=False)),
        (converted, lambda folder: moejax.export(folder, tmp_path / "back", progress=False)),
        (converted, moejax.get_model_config),
        (converted, load_folder),
    ]
    for folder, run in runs:
        opened.clear()
        run(folder)
        assert configs(opened, folder) == 1
        opened.clear()


def test_a_folder_says_what_it_is(source: Path, converted: Path) -> None:
    published = open_folder(source)
    assert (published.path, published.kind, published.mark) == (source, FolderKind.HUGGING_FACE, None)
    assert not published.is_orbax
    assert published.hugging_face == OLMOE
    assert set(published.tensors().entries) == set(olmoe_shapes(OLMOE))
    stored = open_folder(str(converted))
    assert stored.is_orbax
    assert stored.mark == {"format": FORMAT, "dtype": "bfloat16"}
    assert stored.hugging_face == OLMOE | {"dtype": "bfloat16"}
    with pytest.raises(CheckpointError, match="holds Orbax checkpoints"):
        stored.tensors()


def test_an_open_folder_is_taken_wherever_a_path_is(source: Path, converted: Path, tmp_path: Path) -> None:
    published, stored = open_folder(source), open_folder(converted)
    assert open_folder(stored) is stored
    assert same_leaves(load_folder(published), load_folder(source))
    assert same_leaves(load_folder(stored), load_folder(source))
    moejax.export(stored, tmp_path / "back", progress=False)
    assert same_leaves(load_folder(tmp_path / "back"), load_folder(source))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert find("tiny-olmoe").is_dir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelFolder.read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_folder("/no/such/folder")
