"""What stands under a file's name is a regular file of the folder, or is refused before anything is written."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import moejax
from faults.models import NOTES, write

EVERY = ("config.json", "model.safetensors", "tokenizer.json", *NOTES)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's name has at most 107 bytes
        try:
            end.bind(path.name)
        finally:
            os.chdir(before)


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def itself(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def outside(path: Path) -> None:
    kept = path.parent.parent / "private"
    kept.write_text("{}")
    path.symlink_to(kept)


KINDS = (fifo, listening, folder, dangling, itself, device, outside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_every_file_of_a_model(tmp_path: Path, name: str, kind: Callable[[Path], None]) -> None:
    source = write(tmp_path / "model")
    (source / name).unlink()
    kind(source / name)
    for write_folder in (moejax.convert, moejax.export):
        if (name, kind) == ("LICENSE", folder):
            continue  # a folder of licences is none of our business
        with pytest.raises(moejax.MoejaxError, match=name):
            write_folder(source, tmp_path / "out", progress=False)
    if name not in ("README.md", "LICENSE"):
        with pytest.raises(moejax.MoejaxError, match=name):
            moejax.load(source)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "private"}, "nothing was written"


def test_templates_that_transformers_reads(tmp_path: Path) -> None:
    source = write(tmp_path / "model")
    (source / "additional_chat_templates").mkdir()
    outside(source / "additional_chat_templates" / "tool.jinja")
    (tmp_path / "model" / "private").rename(tmp_path / "private")
    (source / "additional_chat_templates" / "tool.jinja").unlink()
    (source / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "private")
    with pytest.raises(moejax.CheckpointError, match="out of its folder"):
        moejax.load(source)


@pytest.mark.parametrize("place", ["weights", "weights/layers.1", "weights/layers.1/_METADATA"])
@pytest.mark.parametrize("kind", ["link out", "fifo"])
def test_parts_of_a_converted_folder(tmp_path: Path, place: str, kind: str) -> None:
    moejax.convert(write(tmp_path / "model"), tmp_path / "out", progress=False)
    path = tmp_path / "out" / place
    shutil.move(path, tmp_path / "private")
    path.symlink_to(tmp_path / "private") if kind == "link out" else os.mkfifo(path)
    for read in (moejax.load, lambda source: moejax.export(source, tmp_path / "again", progress=False)):
        with pytest.raises((moejax.CheckpointError, NotADirectoryError)):
            read(tmp_path / "out")
    assert not (tmp_path / "again").exists()


def test_broken_tokenizer_is_said_first(tmp_path: Path) -> None:
    source = write(tmp_path / "model")
    (source / "tokenizer.json").write_text('{"version": 7}')
    for write_folder in (moejax.convert, moejax.export):
        with pytest.raises(moejax.CheckpointError, match="not a tokenizer file"):
            write_folder(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
