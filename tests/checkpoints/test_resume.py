"""A conversion that was killed never looks finished, and the next run continues where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import moejax

from .files import OLMOE, olmoe_shapes, random_tensors, write_model

_ROOT = Path(__file__).parents[2]
_LONG = OLMOE | {"num_hidden_layers": 40}


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except for the ones in which Orbax notes the time, and their checksums."""
    timed = ("_CHECKPOINT_METADATA", "commit_success.txt", "moejax.json")
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in timed]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", random_tensors(olmoe_shapes(_LONG)), _LONG)


@pytest.mark.slow
def test_killed_conversion_is_resumed(source: Path, tmp_path: Path) -> None:
    destination, partial = tmp_path / "killed", tmp_path / "killed.partial"
    command = [sys.executable, "-m", "moejax", "convert", str(source), str(destination)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (partial / "weights" / "layers.3").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not destination.exists()
    assert not (partial / "config.json").exists(), "a partial folder must not look like a model"
    with pytest.raises(moejax.MoejaxError):
        moejax.load(partial)
    done = moejax.convert(source, destination, progress=False)
    assert 4 <= done.resumed < done.parts == 42
    assert 0 < done.bytes < sum(t.nbytes for t in random_tensors(olmoe_shapes(_LONG)).values())
    assert not partial.exists()
    moejax.convert(source, tmp_path / "uninterrupted", progress=False)
    assert contents(destination) == contents(tmp_path / "uninterrupted")
    assert not [p for p in destination.rglob("*") if "tmp" in p.name or "fingerprint" in p.name]


def _stop_after(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Make a conversion fail after it has written some parts."""
    module = sys.modules["moejax.checkpoints.convert"]  # the package has the function under this name
    save, written = module.save_part, []

    def save_some(path: Path, leaves: dict) -> None:
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(path)
        save(path, leaves)

    monkeypatch.setattr(module, "save_part", save_some)


def _interrupted(source: Path, destination: Path, parts: int, **options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, parts)
        with pytest.raises(KeyboardInterrupt):
            moejax.convert(source, destination, progress=False, **options)
    assert not destination.exists()


@pytest.mark.slow
def test_interrupted_in_the_middle_of_a_part(source: Path, tmp_path: Path) -> None:
    _interrupted(source, tmp_path / "out", 3)
    stale = tmp_path / "out.partial" / "weights" / "layers.2.orbax-checkpoint-tmp-17"
    stale.mkdir()
    (stale / "half").write_bytes(b"half")
    assert moejax.convert(source, tmp_path / "out", progress=False).resumed == 3
    assert not stale.exists()
    assert not (tmp_path / "out" / "weights" / stale.name).exists()


def test_parts_of_another_dtype_or_source_are_not_used(source: Path, tmp_path: Path) -> None:
    _interrupted(source, tmp_path / "out", 3)
    _interrupted(source, tmp_path / "out", 2, dtype="float32")
    other = random_tensors(olmoe_shapes(_LONG), seed=1)
    write_model(source, other, _LONG)
    done = moejax.convert(source, tmp_path / "out", dtype="float32", progress=False)
    assert done.resumed == 0
    embedding = np.asarray(moejax.load(tmp_path / "out").decoder.embedding)
    assert embedding.dtype == np.float32
    assert np.array_equal(embedding, other["model.embed_tokens.weight"].astype(np.float32))


def test_a_part_that_rots_meanwhile_is_written_again(source: Path, tmp_path: Path) -> None:
    _interrupted(source, tmp_path / "out", 3)
    (chunk,) = (tmp_path / "out.partial" / "weights" / "layers.0").rglob("layers.0.feed_forward.experts.down/0.0.0")
    data = bytearray(chunk.read_bytes())
    data[5] ^= 16
    chunk.write_bytes(data)
    assert moejax.convert(source, tmp_path / "out", progress=False).resumed == 2
    moejax.convert(source, tmp_path / "uninterrupted", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_existing_destination_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for write in (moejax.convert, moejax.export):
        with pytest.raises(moejax.CheckpointError, match="exists already; remove it, or choose another"):
            write(source, tmp_path / "out", progress=False)
        with pytest.raises(moejax.CheckpointError, match="parent is not a folder"):
            write(source, tmp_path / "none" / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_everything_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    tensors = random_tensors(olmoe_shapes(OLMOE))
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    source = write_model(tmp_path / "source", tensors)
    said = r"missing model\.norm\.weight.*unused extra\.weight"
    with pytest.raises(moejax.CheckpointError, match=said) as error:
        moejax.convert(source, tmp_path / "out", progress=False)
    assert "misshapen lm_head.weight: the file has [130, 24], the config wants [131, 24]" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tensors = random_tensors(olmoe_shapes(OLMOE))
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"][2, 3] = np.nan
    tensors["lm_head.weight"][5] = -np.inf
    source = write_model(tmp_path / "source", tensors)
    with pytest.raises(moejax.CheckpointError, match="NaN or infinite") as error:
        moejax.convert(source, tmp_path / "out", progress=False)
    assert "'model.layers.1.mlp.experts.4.up_proj.weight' (1)" in str(error.value)
    assert "'lm_head.weight' (24)" in str(error.value)
    assert not (tmp_path / "out").exists()
    moejax.convert(source, tmp_path / "out", allow_nonfinite=True, progress=False)
    assert (
        np.isnan(
            np.asarray(moejax.load(tmp_path / "out").decoder.layers[1].feed_forward.experts.gate_up, np.float32)
        ).sum()
        == 1
    )


def test_weights_too_large_for_the_dtype(tmp_path: Path) -> None:
    tensors = random_tensors(olmoe_shapes(OLMOE))
    tensors["model.norm.weight"][3] = 1e6
    source = write_model(tmp_path / "source", tensors)
    with pytest.raises(moejax.CheckpointError, match=r"'model\.norm\.weight' \(1\)"):
        moejax.convert(source, tmp_path / "out", dtype="float16", progress=False)
    with pytest.raises(moejax.CheckpointError, match="weights cannot have dtype 'int8'"):
        moejax.convert(source, tmp_path / "out", dtype="int8", progress=False)


def test_summary_is_json(tmp_path: Path) -> None:
    done = moejax.convert("tiny-olmoe", tmp_path / "out", progress=False)
    assert json.loads(json.dumps(done.to_dict()))["parts"] == 6
    assert "bytes in" in str(done)
    assert "MB/s" in str(done)
