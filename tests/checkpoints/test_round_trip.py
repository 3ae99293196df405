"""Hugging Face -> Orbax -> Hugging Face gives the same bytes, for every family."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny.hugging_face import every_family

import moejax
from moejax.checkpoints import load_folder, load_orbax, load_torch, save_folder, to_tensors
from moejax.checkpoints.orbax import FORMAT

from . import tiny
from .compare import raw, same_leaves
from .files import OLMOE, olmoe_shapes, random_tensors, write_model


@pytest.fixture(params=tiny.FAMILIES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write(request.param, tmp_path / "published")


def test_bytes_and_leaves_survive(published: Path, tmp_path: Path) -> None:
    moejax.convert(published, tmp_path / "orbax", progress=False)
    moejax.export(tmp_path / "orbax", tmp_path / "again", max_shard_bytes=40_000, progress=False)
    assert raw(tmp_path / "again") == raw(published)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert all(p.stat().st_size < 40_000 + 50_000 for p in (tmp_path / "again").glob("*.safetensors"))
    before, after = moejax.load(published), moejax.load(tmp_path / "orbax")
    assert before.config == after.config == moejax.load(tmp_path / "again").config
    assert same_leaves(before.decoder, after.decoder)


@pytest.mark.parametrize("published", every_family(), indirect=True)
def test_transformers_loads_what_is_exported(published: Path, tmp_path: Path) -> None:
    moejax.export(moejax.load(published), tmp_path / "again", progress=False)
    folders, auto = (published, tmp_path / "again"), transformers.AutoModelForCausalLM
    before, after = (auto.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    for model in (before, after):
        if model.config.model_type not in ("jetmoe", "llama"):  # whose experts have but one implementation, or none
            model.set_experts_implementation("eager")
    tokens = torch.arange(1, 14)[None]
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_a_model_in_memory_is_exported(tmp_path: Path) -> None:
    model = tiny.make("olmoe")
    moejax.export(moejax.load(model), tmp_path / "out", progress=False)
    model.save_pretrained(tmp_path / "published")
    assert raw(tmp_path / "out") == raw(tmp_path / "published")
    assert same_leaves(load_torch(model), load_folder(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))
    done = moejax.convert(source, tmp_path / "orbax", dtype=dtype, progress=False)
    assert done.bytes == sum(len(data) for _, _, data in raw(source).values())
    expected = moejax.load(source, dtype=dtype)
    assert same_leaves(expected.decoder, moejax.load(tmp_path / "orbax", dtype=dtype).decoder)
    if dtype != "float16":  # which rounds
        wide = moejax.load(source, dtype="float32").decoder
        assert same_leaves(wide, load_orbax(tmp_path / "orbax", "float32"))
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["moejax"] == {"format": FORMAT, "dtype": dtype}


def test_stored_leaves_are_read_by_orbax_alone(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tensors = random_tensors(olmoe_shapes(OLMOE))
    moejax.convert(write_model(tmp_path / "source", tensors), tmp_path / "orbax", progress=False)
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(tmp_path / "orbax" / "weights" / "layers.1")
    expected = [tensors[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(6)]
    assert np.array_equal(leaves["layers.1.feed_forward.experts.down"], np.stack(expected))


def test_side_files_and_config_come_along(tmp_path: Path) -> None:
    moejax.convert("tiny-olmoe", tmp_path / "orbax", progress=False)
    moejax.export(tmp_path / "orbax", tmp_path / "again", progress=False)
    bundled = Path(moejax.__file__).parent / "bundled" / "tiny-olmoe"
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (bundled / name).read_bytes()
    assert raw(tmp_path / "again") == raw(bundled)
    prompt = "It is a truth universally"
    assert moejax.load(tmp_path / "orbax").generate(prompt) == moejax.load("tiny-olmoe").generate(prompt)


def test_more_layers_than_digits_sort(tmp_path: Path) -> None:
    """layers.10 comes after layers.9, not after layers.1."""
    config = OLMOE | {"num_hidden_layers": 12}
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(config)), config)
    moejax.convert(source, tmp_path / "orbax", progress=False)
    assert same_leaves(moejax.load(source).decoder, moejax.load(tmp_path / "orbax").decoder)


def test_save_folder_writes_the_same_and_over_the_old(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))
    decoder = load_folder(source)
    for _ in range(2):
        save_folder(decoder, OLMOE, tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert raw(tmp_path / "saved") == raw(source)
    assert to_tensors(decoder).keys() == raw(source).keys()
    with pytest.raises(moejax.ConfigError, match="does not describe this decoder"):
        save_folder(decoder, OLMOE | {"rms_norm_eps": 1e-3}, tmp_path / "saved")


# tensorstore's other reads end after the loop that waited for the failed one is closed, and complain
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))
    moejax.convert(source, tmp_path / "orbax", progress=False)
    leaf = tmp_path / "orbax" / "weights" / "layers.1" / "layers.1.feed_forward.experts.down"
    (leaf / "0.0.0").unlink()
    with pytest.raises(moejax.CheckpointError, match=r"layers\.1"):
        moejax.load(tmp_path / "orbax")
    time.sleep(0.5)


def test_what_does_not_fit_is_named_together(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))
    moejax.convert(source, tmp_path / "orbax", progress=False)
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"vocab_size": 132, "num_experts": 7}))
    with pytest.raises(moejax.CheckpointError, match=r"misshapen embedding.*misshapen .*gate_up.*and \d+ more"):
        moejax.load(tmp_path / "orbax")
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(moejax.CheckpointError, match=r"missing part layers\.3; missing part layers\.4"):
        moejax.load(tmp_path / "orbax")
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"moejax": {"format": 1}}))
    with pytest.raises(moejax.ConfigError, match="format"):
        moejax.load(tmp_path / "orbax")
