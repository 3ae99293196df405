"""Folders that an older version converted are still read, although leaves have been renamed since."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import moejax
from moejax.checkpoints import load_folder
from moejax.checkpoints.folder import open_folder
from moejax.checkpoints.orbax import FORMAT, OrbaxFolder, save_part
from moejax.checkpoints.plan import leaf_paths, parts
from moejax.models import Decoder, family, old_paths
from moejax.models.old_paths import RENAMES, Rename, current_path, old_path

from .compare import raw, same_leaves
from .files import OLMOE, olmoe_shapes, random_tensors, write_model

INVENTED = (
    Rename("layers.{layer}.post_norm", "layers.{layer}.feed_forward_norm", lambda fields: fields["model_type"] == "no"),
    Rename("layers.{layer}.mixer.norm.weight", "layers.{layer}.attention_norm.weight"),
    Rename("layers.{layer}.mixer", "layers.{layer}.attention"),
    Rename("last_norm", "norm", lambda fields: fields["model_type"] == "olmoe"),
)
"""A leaf, a module in front of several leaves, and lines that hold for some models only."""

TABLES = {"shipped": RENAMES, "invented": INVENTED}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(old_paths, "RENAMES", TABLES[request.param])
    return request.param


def write_format_2(source: Path, folder: Path) -> Path:
    """Convert a folder, then rename its leaves back as format 2 had them."""
    moejax.convert(source, folder.with_name("current"), progress=False)
    stored = OrbaxFolder(open_folder(folder.with_name("current")))
    shutil.copytree(folder.with_name("current"), folder, ignore=shutil.ignore_patterns("weights", "moejax.json"))
    (folder / "weights").mkdir()
    for part in parts(stored.leaves):
        leaves = {old_path(path, stored.folder.hugging_face): leaf for path, leaf in stored.restore(part).items()}
        save_part(folder / "weights" / part, leaves)
    config = json.loads((folder / "config.json").read_text())
    assert config["moejax"]["format"] == FORMAT
    (folder / "config.json").write_text(json.dumps(config | {"moejax": config["moejax"] | {"format": 2}}))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))


def test_a_folder_of_format_2_loads_and_exports(table: str, source: Path, tmp_path: Path) -> None:
    old = write_format_2(source, tmp_path / "old")
    assert same_leaves(load_folder(old), load_folder(source))
    mesh = jax.make_mesh((1,), ("expert",))
    assert same_leaves(load_folder(old, mesh=mesh), load_folder(source))
    moejax.export(old, tmp_path / "back", progress=False)
    assert raw(tmp_path / "back") == raw(source)


def test_problems_are_named_as_the_folder_has_them(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(old_paths, "RENAMES", INVENTED)
    old = write_format_2(source, tmp_path / "old")
    stored = OrbaxFolder(open_folder(old)).restore("layers.1")
    leaves = {old_path(path, OLMOE): np.asarray(leaf) for path, leaf in stored.items()}
    leaves["layers.1.ghost"] = leaves.pop("layers.1.mixer.output.weight")
    leaves["layers.1.mixer.norm.weight"] = leaves["layers.1.mixer.norm.weight"][:5]
    save_part(old / "weights" / "layers.1", leaves)
    said = r"missing layers\.1\.mixer\.output\.weight.*unused .*ghost.*misshapen layers\.1\.mixer\.norm\.weight"
    with pytest.raises(moejax.CheckpointError, match=said):
        load_folder(old)


def test_old_paths_in_a_current_folder_are_refused(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(old_paths, "RENAMES", INVENTED)
    old = write_format_2(source, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"moejax": {"format": FORMAT}}))
    with pytest.raises(moejax.CheckpointError, match=r"missing layers\.0\.attention_norm\.weight"):
        load_folder(old)


SIZES = {"vocab_size": 131, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Mapping[str, Any]] = {
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {"moe_intermediate_size": 14, "num_experts": 6, "decoder_sparse_step": 2},
    "qwen3_moe": {"moe_intermediate_size": 14, "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 6},
    "gpt_oss": {"num_local_experts": 6},
    "jetmoe": {"kv_channels": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama": {"mlp_bias": True},
    "moejax": {"moe": "smoe", "moe_layers": [0], "num_experts": 6},
}


@pytest.mark.parametrize("model", MODELS)
def test_old_paths_are_distinct_and_lead_back(model: str, table: str) -> None:
    """For every leaf of every family, so that no line of the table hides another."""
    fields = {"model_type": model, **SIZES, **HEADS, **MODELS[model]}
    paths = [path for path, _ in leaf_paths(Decoder.abstract(family(model).config(fields)))]
    old = [old_path(path, fields) for path in paths]
    assert len(set(old)) == len(paths)
    assert [current_path(path, fields) for path in old] == paths
    assert list(parts(old).values()) == [[old_path(path, fields) for path in group] for group in parts(paths).values()]


def test_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old_paths, "RENAMES", INVENTED)
    fields = {"model_type": "olmoe"}
    assert current_path("layers.12.mixer.norm.weight", fields) == "layers.12.attention_norm.weight"
    assert current_path("layers.12.mixer.output.bias", fields) == "layers.12.attention.output.bias"
    assert current_path("layers.12.mixers.output.bias", fields) == "layers.12.mixers.output.bias"
    assert current_path("last_norm.weight", fields) == "norm.weight"
    assert current_path("last_norm.weight", {"model_type": "llama"}) == "last_norm.weight"
    assert old_path("layers.3.attention_norm.weight", fields) == "layers.3.mixer.norm.weight"
    assert old_path("layers.3.feed_forward_norm.weight", fields) == "layers.3.feed_forward_norm.weight"
