"""Every fault of a folder raises a ``MoejaxError`` that names the fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moejax
from moejax import CheckpointError, ConfigError, MoejaxError
from moejax.checkpoints.tokenizer import Tokenizer

QUERY = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.3.down_proj.weight"


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of the published folder, to break."""
    return Path(shutil.copytree(published, tmp_path / "model"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded folder, to break."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def message(source: Path, kind: type[MoejaxError]) -> str:
    """Return the message of the error that loading raises; it must be of the right kind and have one line."""
    with pytest.raises(kind) as error:
        moejax.load(source)
    assert isinstance(error.value, MoejaxError)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_errors_are_moejax_errors() -> None:
    assert issubclass(CheckpointError, MoejaxError)
    assert issubclass(ConfigError, MoejaxError)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in message(folder, ConfigError)


def test_empty_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in message(tmp_path, ConfigError)


@pytest.mark.parametrize("text", ["{'model_type':", "", "[1, 2]", "null", "\udcff"], ids=repr)
def test_config_is_not_a_json_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    text = message(folder, ConfigError)
    assert "config.json" in text
    assert "JSON" in text


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="gpt_neox")
    text = message(folder, ConfigError)
    assert "gpt_neox" in text
    assert "olmoe" in text


def test_no_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "model_type" in message(folder, ConfigError)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    text = message(folder, CheckpointError)
    assert "model.safetensors" in text


def test_missing_shard(shards: Path) -> None:
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in message(shards, CheckpointError)


def test_all_missing_shards_are_named(shards: Path) -> None:
    lost = sorted(shards.glob("*.safetensors"))[:2]
    for shard in lost:
        shard.unlink()
    text = message(shards, CheckpointError)
    assert all(shard.name in text for shard in lost)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_shard(keep: float, shards: Path) -> None:
    cut = sorted(shards.glob("*.safetensors"))[1]
    with cut.open("r+b") as file:
        file.truncate(int(cut.stat().st_size * keep))
    text = message(shards, CheckpointError)
    assert "truncated" in text
    assert cut.name in text


def test_index_that_promises_too_much(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.surprise"] = sorted(shards.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))
    assert "model.layers.7.surprise" in message(shards, CheckpointError)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_index_that_is_not_an_index(text: str, shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in message(shards, CheckpointError)


HEADERS = {
    "not JSON": b"x" * 40,
    "not UTF-8": b"\xff" * 40,
    "not an object": b"[1, 2, 3]",
    "entry is not an object": b'{"w": 3}',
    "entry without shape": b'{"w": {"dtype": "F32", "data_offsets": [0, 4]}}',
    "unknown dtype": b'{"w": {"dtype": "F13", "shape": [1], "data_offsets": [0, 4]}}',
    "bytes do not fit shape": b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "offsets are not numbers": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}',
    "shape is not numbers": b'{"w": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}',
    "negative offsets": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    "negative shape": b'{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    "offsets behind the end": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [400, 404]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_garbage_header(header: bytes, folder: Path) -> None:
    write_header(folder / "model.safetensors", header, b"\0" * 8)
    assert "model.safetensors" in message(folder, CheckpointError)


def test_garbage_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")
    assert "model.safetensors" in message(folder, CheckpointError)


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    assert "model.safetensors" in message(folder, CheckpointError)


def test_missing_key(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(QUERY))
    assert f"missing {QUERY}" in message(folder, CheckpointError)


def test_missing_key_of_one_expert(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(EXPERT))
    assert f"missing {EXPERT}" in message(folder, CheckpointError)


def test_key_too_many(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.1.mlp.shared.weight": np.zeros((3, 2), np.float32)}))
    text = message(folder, CheckpointError)
    assert "unused model.layers.1.mlp.shared.weight [3, 2]" in text


@pytest.mark.parametrize(("key", "want"), [(QUERY, [48, 48]), (EXPERT, [48, 14])])
def test_wrong_shape_names_key_and_both_shapes(key: str, want: list[int], folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({key: np.zeros((5, 4), np.float32)}))
    text = message(folder, CheckpointError)
    assert key in text
    assert "[5, 4]" in text
    assert str(want) in text


def test_transposed_expert_is_refused(folder: Path) -> None:
    """Its data has the right size, so only its shape is wrong."""
    edit_tensors(folder, lambda t: t.update({EXPERT: np.ascontiguousarray(t[EXPERT].T)}))
    text = message(folder, CheckpointError)
    assert "[14, 48]" in text
    assert "[48, 14]" in text


def test_several_problems_are_reported_together(folder: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors[QUERY]
        tensors[EXPERT] = np.zeros((5, 4), np.float32)
        tensors["extra"] = np.zeros(1, np.float32)

    edit_tensors(folder, edit)
    text = message(folder, CheckpointError)
    assert all(word in text for word in (f"missing {QUERY}", f"misshapen {EXPERT}", "unused extra"))


def test_many_problems_are_counted(folder: Path) -> None:
    edit_config(folder, intermediate_size=15)
    text = message(folder, CheckpointError)
    # 2 layers, 9 experts, 3 matrices each; 8 of them are listed
    assert "and 46 more" in text


def test_integer_weights_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({QUERY: t[QUERY].astype(np.int32)}))
    assert QUERY in message(folder, CheckpointError)


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in message(folder, CheckpointError)


def test_a_folder_without_tokenizer_loads(folder: Path) -> None:
    assert Tokenizer.from_folder(folder) is None
    with pytest.raises(MoejaxError, match="has no tokenizer; pass token ids"):
        moejax.load(folder).generate("text")


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no-such-model", "not a valid/ id!", "/no/such/folder"])
def test_unreachable_name(name: str) -> None:
    assert name in message(name, CheckpointError)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert "model.safetensors" in message(folder / "model.safetensors", CheckpointError)
