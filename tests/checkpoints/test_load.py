"""Every published form of a model loads to the same decoder, and goes back to the same bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import moejax
from moejax.checkpoints import read_config, save_folder

from .compare import as_bytes, assert_same


def write_fused(model: Any, folder: Path) -> None:
    """A folder with the keys of the torch modules themselves: all experts of a layer in one tensor."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def test_single_file(published: Path, toy_lm: moejax.LM) -> None:
    assert_same(moejax.load(published).decoder, toy_lm.decoder)


def test_shards(sharded: Path, toy_lm: moejax.LM) -> None:
    assert_same(moejax.load(str(sharded)).decoder, toy_lm.decoder)


def test_fused_experts(toy_torch: Any, tmp_path: Path, toy_lm: moejax.LM) -> None:
    write_fused(toy_torch, tmp_path)
    assert_same(moejax.load(tmp_path).decoder, toy_lm.decoder)


def test_published_and_fused_layouts_have_different_keys(published: Path, read_tensors: Callable) -> None:
    """Otherwise the two tests above would test the same layout twice."""
    keys = read_tensors(published).keys()
    assert "model.layers.1.mlp.experts.8.up_proj.weight" in keys
    assert not any(key.endswith("gate_up_proj") for key in keys)


def test_config_of_transformers_4(published: Path, tmp_path: Path, toy_lm: moejax.LM) -> None:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    config = read_config(tmp_path)
    rope = config.pop("rope_parameters")
    assert rope["rope_type"] == "default"
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(moejax.load(tmp_path).decoder, toy_lm.decoder)


def test_leaves_are_device_arrays_in_the_checkpoints_dtype(published: Path) -> None:
    leaves = jax.tree.leaves(moejax.load(published).decoder)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)


def test_loaded_weights_survive_their_file(published: Path, tmp_path: Path, toy_lm: moejax.LM) -> None:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    decoder = moejax.load(tmp_path).decoder
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(bytes(size))
    assert_same(decoder, toy_lm.decoder)


@pytest.fixture(scope="module")
def bfloat16(make_olmoe: Callable) -> Any:
    import copy

    return copy.deepcopy(make_olmoe(seed=1)).bfloat16()


@pytest.mark.parametrize("form", ["memory", "folder"])
def test_bfloat16_stays_bfloat16(form: str, bfloat16: Any, tmp_path: Path) -> None:
    """A folder's weights would be widened on a CPU, unless it is asked for."""
    bfloat16.save_pretrained(tmp_path)
    decoder = (moejax.load(bfloat16) if form == "memory" else moejax.load(tmp_path, dtype="bfloat16")).decoder
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder)} == {jnp.dtype(jnp.bfloat16)}
    want = bfloat16.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(decoder.embedding.astype(jnp.float32), want)


@pytest.mark.parametrize("form", ["memory", "folder"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, "bfloat16"], ids=str)
def test_dtype_converts(dtype: Any, form: str, published: Path, toy_torch: Any, toy_lm: moejax.LM) -> None:
    decoder = moejax.load(toy_torch if form == "memory" else published, dtype=dtype).decoder
    assert_same(decoder, jax.tree.map(lambda p: p.astype(dtype), toy_lm.decoder))


OPTIONS = {"default": {}, "attention_bias": {"attention_bias": True}, "tied": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_round_trip_gives_the_same_bytes(
    options: dict,
    make_olmoe: Callable,
    read_tensors: Callable,
    torch_logits: Callable,
    toy_tokens: np.ndarray,
    tmp_path: Path,
) -> None:
    """Hugging Face -> moejax -> Hugging Face: every tensor byte for byte, and transformers computes the same."""
    import transformers

    model = make_olmoe(**options)
    source, copied = tmp_path / "source", tmp_path / "copied"
    model.save_pretrained(source)
    save_folder(moejax.load(source).decoder, read_config(source), copied)
    assert as_bytes(read_tensors(copied)) == as_bytes(read_tensors(source))
    again = transformers.OlmoeForCausalLM.from_pretrained(copied, attn_implementation="eager")
    again.set_experts_implementation("eager")
    np.testing.assert_array_equal(torch_logits(again, toy_tokens), torch_logits(model, toy_tokens))


def test_round_trip_of_bfloat16_shards(bfloat16: Any, tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    source, copied = tmp_path / "source", tmp_path / "copied"
    bfloat16.save_pretrained(source, max_shard_size="60KB")
    save_folder(moejax.load(source, dtype="bfloat16").decoder, read_config(source), copied)
    want = {k: v for f in source.glob("*.safetensors") for k, v in safetensors.torch.load_file(f).items()}
    got = safetensors.torch.load_file(copied / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(got[k].dtype == torch.bfloat16 and torch.equal(got[k], want[k]) for k in want)
    assert read_config(copied)["dtype"] == "bfloat16"


def test_export_leaves_no_partial_file(toy_lm: moejax.LM, toy_config: dict, tmp_path: Path) -> None:
    save_folder(toy_lm.decoder, toy_config, tmp_path / "new" / "folder")
    assert {f.name for f in (tmp_path / "new" / "folder").iterdir()} == {"model.safetensors", "config.json"}


def test_export_may_replace_the_folder_it_was_loaded_from(published: Path, tmp_path: Path, toy_lm: moejax.LM) -> None:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    save_folder(moejax.load(tmp_path).decoder, read_config(tmp_path), tmp_path)
    assert_same(moejax.load(tmp_path).decoder, toy_lm.decoder)


def test_ml_dtypes_bfloat16_is_what_jax_uses() -> None:
    assert jnp.dtype(jnp.bfloat16) == np.dtype(ml_dtypes.bfloat16)
