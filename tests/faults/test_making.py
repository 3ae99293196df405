"""Making a folder: what is not ours stays, what is done is known, what changes or rots is noticed."""

import json
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import moejax
from faults.models import write
from moejax import writing
from moejax.errors import BusyError

WRITERS = (moejax.convert, moejax.export)
both = pytest.mark.parametrize("make", WRITERS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is not ours


@both
@pytest.mark.parametrize("what", ["folder", "empty", "file", "link", "in ours", "in a folder of ours"])
def test_nothing_of_others_is_removed(source: Path, tmp_path: Path, make, what: str) -> None:
    partial, kept = tmp_path / "out.partial", tmp_path / "kept"
    if what == "file":
        partial.write_text("the only copy")
    elif what == "link":
        kept.mkdir()
        partial.symlink_to(kept)
    elif what in ("folder", "empty"):
        partial.mkdir()
        if what == "folder":
            (partial / "thesis.txt").write_text("the only copy")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["moejax.checkpoints.convert"], "save_part", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                moejax.convert(source, tmp_path / "out", progress=False)
        inner = partial if what == "in ours" else partial / "weights"
        (inner / "thesis.txt").write_text("the only copy")
    with pytest.raises(moejax.CheckpointError, match=r"out\.partial .*move it away, or choose another") as error:
        make(source, tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)
    assert partial.exists()
    assert "empty" in what or what == "link" or [p for p in (partial, *partial.rglob("*")) if _is_copy(p)]
    assert not (tmp_path / "out").exists()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _is_copy(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == b"the only copy"


@both
def test_lock(source: Path, tmp_path: Path, make) -> None:
    lock = writing.lock_beside(tmp_path / "out")
    with (
        writing.locked(lock, tmp_path / "out"),
        pytest.raises(BusyError, match=rf"out: another run \(process {os.getpid()}"),
    ):
        make(source, tmp_path / "out", progress=False)
    assert names(tmp_path) == ["model"]
    lock.write_text("moejax lock: process 1 on nowhere")  # of a run that was killed
    make(source, tmp_path / "out", progress=False)
    assert names(tmp_path) == ["model", "out"]
    lock.write_text("my notes")
    with pytest.raises(moejax.MoejaxError, match="not a lock file of moejax"):
        make(source, tmp_path / "out", progress=False)
    assert lock.read_text() == "my notes"


def test_without_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(37, "No locks available")

    for flock, why in ((None, "none that moejax knows"), (refuse, "No locks available")):
        monkeypatch.setattr(writing, "_flock", lambda flock=flock: flock)
        with pytest.warns(RuntimeWarning, match=why), writing.locked(tmp_path / "lock", tmp_path):
            pass


# ---- twice in a row


@both
def test_twice_in_a_row(source: Path, tmp_path: Path, make) -> None:
    assert not make(source, tmp_path / "out", progress=False).already
    before = (tmp_path / "out" / "moejax.json").read_bytes()
    done = make(source, tmp_path / "out", progress=False)
    assert done.already
    assert "nothing was done" in str(done)
    assert (tmp_path / "out" / "moejax.json").read_bytes() == before
    option = {"dtype": "bfloat16"} if make is moejax.convert else {"max_shard_bytes": 20_000}
    with pytest.raises(moejax.CheckpointError, match="made from another source or with other options"):
        make(source, tmp_path / "out", progress=False, **option)
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(moejax.CheckpointError, match=r"not as it was written \(README\.md"):
        make(source, tmp_path / "out", progress=False)
    write(source, seed=1)
    with pytest.raises(moejax.CheckpointError, match="made from another source"):
        make(source, tmp_path / "out", progress=False)


def test_a_loaded_model_twice(source: Path, tmp_path: Path) -> None:
    lm = moejax.load(source)
    moejax.export(lm, tmp_path / "out", progress=False)
    assert moejax.export(lm, tmp_path / "out", progress=False).already
    other = moejax.load(write(tmp_path / "other", seed=1))
    with pytest.raises(moejax.CheckpointError, match="made from another source"):
        moejax.export(other, tmp_path / "out", progress=False)


# ---- sources that change

CHANGES = ("replaced", "in place", "in place, with its time put back", "config", "tokenizer")


def _change(source: Path, other: Path, how: str) -> None:
    name = {"config": "config.json", "tokenizer": "tokenizer.json"}.get(how, "model.safetensors")
    if how == "replaced":
        os.replace(other / name, source / name)
        return
    before = (source / name).stat()
    data = (other / name).read_bytes() if name == "model.safetensors" else (source / name).read_bytes() + b" "
    with (source / name).open("r+b") as file:
        file.write(data)
    if "time" in how:
        os.utime(source / name, ns=(before.st_atime_ns, before.st_mtime_ns))


def _attack(work: Path, make, how: str, after: int) -> str:
    """Change the source after some parts were read; return how the run ended."""
    source, other = write(work / "model"), write(work / "other", seed=1)
    readers = sys.modules["moejax.checkpoints.readers"].HuggingFaceReader
    honest, reads = readers.read, []

    def read(self, part: str):
        found = honest(self, part)
        reads.append(part)
        if len(reads) == after:
            _change(source, other, how)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "read", read)
        with pytest.raises(moejax.CheckpointError, match="changed while the model was read") as error:
            make(source, work / "out", progress=False)
    assert not (work / "out").exists()
    return str(error.value)


@both
@pytest.mark.parametrize("how", CHANGES)
def test_a_source_that_changes(tmp_path: Path, make, how: str) -> None:
    _attack(tmp_path, make, how, after=2)


@pytest.mark.slow
@both
def test_many_changes(tmp_path: Path, make) -> None:
    draw = random.Random(6)
    for number in range(50):
        (tmp_path / str(number)).mkdir()
        _attack(tmp_path / str(number), make, draw.choice(CHANGES), draw.randint(1, 5))


# ---- disks that err


@both
def test_what_reads_back_differently_is_no_success(source: Path, tmp_path: Path, make, monkeypatch) -> None:
    staging, safetensors = (sys.modules[f"moejax.checkpoints.{name}"] for name in ("staging", "safetensors"))
    if make is moejax.convert:
        monkeypatch.setattr(staging.Staging, "copy", _copy_wrong)
    else:
        monkeypatch.setattr(safetensors.SafetensorsFile, "checksum", lambda self, key: 7)
    with pytest.raises(moejax.CheckpointError, match="reads back differently"):
        make(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def _copy_wrong(self, source: Path, listed) -> None:
    self.declare(*listed)
    self.expected |= {name: (1, 1) for name in listed}
    for name in listed:
        (self.folder / name).write_bytes((source / name).read_bytes())


def test_flipped_bits_of_a_converted_folder(source: Path, tmp_path: Path) -> None:
    moejax.convert(source, tmp_path / "out", progress=False)
    draw = random.Random(8)
    files = sorted(path for path in (tmp_path / "out" / "weights").rglob("*") if path.is_file())
    for path in draw.sample(files, 8):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(moejax.CheckpointError):
            moejax.load(tmp_path / "out")
        path.write_bytes(whole)
    (tmp_path / "out" / "moejax.json").unlink()  # as older versions wrote it
    old = moejax.load(tmp_path / "out").decoder
    assert np.array_equal(np.asarray(old.embedding), np.asarray(moejax.load(source).decoder.embedding))


@pytest.mark.parametrize("text", ["{", "{}", '{"about": {}, "files": {"../x": [1, 2]}, "made": []}'])
def test_a_damaged_manifest(source: Path, tmp_path: Path, text: str) -> None:
    moejax.convert(source, tmp_path / "out", progress=False)
    (tmp_path / "out" / "moejax.json").write_text(text)
    with pytest.raises(moejax.CheckpointError, match=r"moejax\.json"):
        moejax.load(tmp_path / "out")


# ---- one file


def test_a_file_is_complete_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o640)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device.*page\.html"):
            writing.write_file(path, "new")
    assert path.read_text() == "old"
    (tmp_path / "link.html").symlink_to(path)
    writing.write_file(tmp_path / "link.html", "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["link.html", "page.html"]
    assert json.dumps(names(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writing.write_file(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
