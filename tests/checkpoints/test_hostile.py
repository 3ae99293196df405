"""Hostile and damaged files raise a clear error, and no memory is spent on them."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import moejax
from moejax.checkpoints import read_config
from moejax.checkpoints.safetensors import SafetensorsFile, SafetensorsFolder
from moejax.errors import CheckpointError, ConfigError

from .files import OLMOE, header_bytes, olmoe_shapes, random_tensors, write_model, write_sparse_shards


def _entry(begin: Any, end: Any, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def _refused(path: Path, content: bytes, said: str) -> None:
    """Check that opening the file raises an error with this message and takes little memory."""
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said) as error:
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


HEADERS: dict[str, tuple[Any, str]] = {
    "a list": (b"[1, 2]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "not JSON": (b"{nonsense}", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "byte 2 is not valid UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
    "nested deep": (b"[" * 1_000_000, "not valid JSON"),
    "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "not valid JSON"),
    "a key twice": (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', "'a' occurs twice"),
    "a field twice": (b'{"a": {"dtype": "U8", "dtype": "F32"}}', "'dtype' occurs twice"),
    "an entry that is not an object": ({"a": 7}, "malformed"),
    "an entry that is a list": ({"a": []}, "malformed"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 3]}}, "malformed"),
    "an unknown dtype": ({"a": _entry(0, 24, dtype="F7")}, "dtype 'F7'; known are"),
    "a dtype in lower case": ({"a": _entry(0, 24, dtype="f32")}, "dtype 'f32'"),
    "a dtype that is not text": ({"a": _entry(0, 24, dtype=["F32"])}, "dtype"),
    "an endless dtype": ({"a": _entry(0, 24, dtype="F" * 99_999)}, "dtype"),
    "a negative size": ({"a": _entry(0, 24, shape=(-2, -3))}, "shape"),
    "a size of half": ({"a": _entry(0, 24, shape=(2.0, 3))}, "shape"),
    "a size of true": ({"a": _entry(0, 12, shape=(True, 3))}, "shape"),
    "a size as text": ({"a": _entry(0, 24, shape=("2", 3))}, "shape"),
    "a shape that is a number": ({"a": _entry(0, 24, shape=6)}, "shape"),
    "a shape that is text": ({"a": _entry(0, 24, shape="23")}, "shape"),
    "a huge shape": ({"a": _entry(0, 24, shape=(2**40, 2**40))}, "too large for any memory"),
    "a huge empty shape": ({"a": _entry(0, 0, shape=(2**62, 0, 2**62))}, "too large for any memory"),
    "too many axes": ({"a": _entry(0, 4, shape=(1,) * 40)}, "shape"),
    "a shape of other size": ({"a": _entry(0, 24, shape=(2, 4))}, "has 24 bytes, but its shape .* needs 32"),
    "negative offsets": ({"a": _entry(-24, 0)}, "data_offsets"),
    "offsets backwards": ({"a": _entry(24, 0)}, "data_offsets"),
    "offsets that are not integers": ({"a": _entry(0.0, 24.0)}, "data_offsets"),
    "offsets as text": ({"a": _entry("0", "24")}, "data_offsets"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 12, 24]}}, "data_offsets"),
    "offsets beyond the file": ({"a": _entry(0, 24), "b": _entry(24, 48)}, "'b': truncated"),
    "far offsets": ({"a": _entry(2**60, 2**60 + 24)}, "'a': truncated"),
    "overlap": ({"a": _entry(0, 24), "b": _entry(12, 24, shape=(3,))}, "'b' overlaps"),
    "the same bytes twice": ({"a": _entry(0, 24), "b": _entry(0, 24)}, "overlaps"),
    "a gap": ({"a": _entry(12, 24, shape=(3,))}, "leaves a gap"),
    "bytes of no tensor": ({"a": _entry(0, 12, shape=(3,))}, "12 bytes after the last tensor"),
    "no tensor at all": ({}, "24 bytes after the last"),
    "a key of control characters": ({"a\n\x1b[31m": 7}, r"'a\\n\\x1b\[31m'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header(tmp_path: Path, name: str) -> None:
    header, said = HEADERS[name]
    _refused(tmp_path / "x.safetensors", header_bytes(header) + bytes(24), said)


@pytest.mark.parametrize("length", [3, 2**20, 2**31, 2**63, 2**64 - 1])
def test_header_length(tmp_path: Path, length: int) -> None:
    said = "not a safetensors file"
    _refused(tmp_path / "x.safetensors", header_bytes({"a": _entry(0, 24)}, length) + bytes(24), said)


@pytest.mark.parametrize("size", range(8))
def test_stub(tmp_path: Path, size: int) -> None:
    _refused(tmp_path / "x.safetensors", bytes(size), "truncated, or not")


def test_header_that_claims_gigabytes_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((3 << 30).to_bytes(8, "little"))
    os.truncate(path, 4 << 30)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="claims a header of 3221225472 bytes"):
        SafetensorsFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((0, 5), np.uint8),
        "c": np.ones((), bool),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert {key: file.entries[key].shape for key in file.entries} == {"a": (2, 3), "b": (0, 5), "c": ()}
    for key, value in tensors.items():
        out = np.empty(value.size, value.dtype)
        file.copy_to(key, out)
        assert np.array_equal(file.read(key), value)
        assert np.array_equal(out, value.reshape(-1))


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed while the model was read"):
        file.copy_to("a", np.empty(100, np.float32))


_FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
)
_ALMOST = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F8"]) | _JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 24) | st.integers(), min_size=2, max_size=2) | _JSON,
        "more": _JSON,
    },
)


def _opened_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for key in file.entries:
        assert file.read(key).nbytes <= len(content)


@_FUZZ
@given(st.binary(max_size=60))
def test_fuzz_random_bytes(tmp_path: Path, content: bytes) -> None:
    _opened_or_refused(tmp_path / "x", content)
    _opened_or_refused(tmp_path / "x", header_bytes(content) + bytes(24))


@_FUZZ
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _ALMOST | _JSON, max_size=4), st.integers(0, 48))
def test_fuzz_headers_that_are_almost_right(tmp_path: Path, header: dict, size: int) -> None:
    _opened_or_refused(tmp_path / "x", header_bytes(header) + bytes(size))


@_FUZZ
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 400))
def test_fuzz_valid_files_with_changed_bytes(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    header = {"a": _entry(0, 24), "b": _entry(24, 36, shape=(3,)), "__metadata__": {"format": "pt"}}
    content = bytearray(header_bytes(header) + bytes(36))
    for place, value in changes:
        content[place % len(content)] = value
    _opened_or_refused(tmp_path / "x", bytes(content))
    _opened_or_refused(tmp_path / "x", bytes(content[:cut]))


# ---- folders


def _sharded(folder: Path) -> dict[str, Any]:
    write_sparse_shards(folder, OLMOE)
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", "..\\x"]
)
def test_index_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    index = _sharded(tmp_path / "model")
    (tmp_path / "model" / "model-1.safetensors").rename(tmp_path / "outside.safetensors")
    moved = {key: name if shard == "model-1.safetensors" else shard for key, shard in index["weight_map"].items()}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match="is not the name of a file in the folder"):
        moejax.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "not valid UTF-8"),
        (b"[]", "not a JSON object"),
        (b"{}", "no 'weight_map'"),
        (b'{"weight_map": []}', "no 'weight_map'"),
        (b'{"weight_map": {}}', "no 'weight_map'"),
        (b'{"weight_map": {"a": 1}}', "no 'weight_map'"),
        (b'{"weight_map": {"a": "b", "a": "c"}}', "'a' occurs twice"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "missing shards: gone.safetensors"),
        (b'{"weight_map": {"a": "model-1.safetensors"}}', "lists keys that its shards lack: a"),
    ],
)
def test_index(tmp_path: Path, content: bytes, said: str) -> None:
    _sharded(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        SafetensorsFolder(tmp_path / "model")


def test_key_in_two_shards(tmp_path: Path) -> None:
    index = _sharded(tmp_path / "model")
    (tmp_path / "model" / "copy.safetensors").write_bytes((tmp_path / "model" / "model-1.safetensors").read_bytes())
    first = next(key for key, shard in index["weight_map"].items() if shard == "model-1.safetensors")
    index["weight_map"][first] = "copy.safetensors"
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="repeats keys of other shards"):
        SafetensorsFolder(tmp_path / "model")


def test_links(tmp_path: Path) -> None:
    """Links out of the folder are refused; links inside it, and a folder that is itself a link, are followed."""
    source = write_model(tmp_path / "private", random_tensors(olmoe_shapes(OLMOE)))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").write_bytes((source / "config.json").read_bytes())
    (linked / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a link out of its folder, to .*private.*copy it in"):
        moejax.convert(linked, tmp_path / "out", progress=False)

    (linked / "model.safetensors").unlink()
    (linked / "weights.bin.real").write_bytes((source / "model.safetensors").read_bytes())
    (linked / "model.safetensors").symlink_to("weights.bin.real")
    moejax.load(linked)
    (tmp_path / "alias").symlink_to(linked)
    moejax.load(tmp_path / "alias")


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))
    repository = tmp_path / "hub" / "models--somebody--something"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).rename(blobs / name[:5])
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name[:5])
    moejax.load(snapshot)
    moejax.convert(snapshot, tmp_path / "out", progress=False)

    other = tmp_path / "hub" / "models--somebody--else" / "blobs"
    other.mkdir(parents=True)
    (blobs / "model").rename(other / "model")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "model")
    with pytest.raises(CheckpointError, match="a link out of its folder"):
        moejax.load(snapshot)


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", random_tensors(olmoe_shapes(OLMOE)))
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")  # to open it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        moejax.load(source)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError):
        moejax.load(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_mend(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch /tmp/moejax_was_here'\ntR.")
    with pytest.raises(CheckpointError, match=rf"only {name}, a pickle.*not read.*save_pretrained"):
        moejax.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model_type": "olmo\xe9"}', "not valid UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"7", "not a JSON object"),
        (b'{"model_type": "olmoe", "model_type": "mixtral"}', "'model_type' occurs twice"),
        (
            json.dumps(OLMOE | {"num_hidden_layers": 10**12}).encode(),
            "layers=1000000000000 is not an integer",
        ),
        (json.dumps(OLMOE | {"num_experts": -6}).encode(), "num_experts=-6"),
        (json.dumps(OLMOE | {"hidden_size": "24"}).encode(), "hidden_size='24'"),
        (json.dumps(OLMOE | {"vocab_size": 131.5}).encode(), "vocab_size=131.5"),
        (json.dumps(OLMOE | {"num_attention_heads": True}).encode(), "num_attention_heads=True"),
    ],
)
def test_config(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ConfigError, match=said):
        moejax.load(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_huge_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{")
    os.truncate(tmp_path / "config.json", 8 << 30)  # sparse
    with pytest.raises(ConfigError, match="too many for a JSON file"):
        read_config(tmp_path)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    tensors = random_tensors(olmoe_shapes(OLMOE))
    tensors["model.norm.weight"] = np.ones(24, np.int64)
    with pytest.raises(CheckpointError, match=r"mistyped model\.norm\.weight: int64"):
        moejax.load(write_model(tmp_path / "model", tensors))
