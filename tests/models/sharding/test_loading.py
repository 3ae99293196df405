"""Loading over a mesh: each device is given its part, and no more than that is read or held."""

import math
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny.compare import close
from tiny.four_devices import FAMILIES, LAYOUTS, decoder, hugging_face, mesh, random_decoder, single

from models.sharding.placement import check_parts
from moejax import explain, load
from moejax.checkpoints import save_folder
from moejax.checkpoints.load import load_decoder
from moejax.checkpoints.plan import LeafPlan, leaf_paths, make_plan
from moejax.checkpoints.safetensors import SafetensorsFolder
from moejax.models import Decoder, family, shardings

TOKENS = np.arange(1, 12)


def published(name: str, folder: Path) -> Path:
    """The Hugging Face files of the tiny decoder."""
    save_folder(decoder(name), hugging_face(name), folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_device_is_given_its_part(name: str, layout: str, tmp_path: Path) -> None:
    lm = load(published(name, tmp_path), mesh=mesh(layout), sharding=LAYOUTS[layout][1])
    check_parts(lm.decoder, decoder(name), layout)


def test_a_loaded_model_computes_in_the_asked_dtype(tmp_path: Path) -> None:
    folder = published("olmoe", tmp_path)
    close(load(folder, mesh=mesh("both"))(TOKENS), single("olmoe")(TOKENS))
    half = load(folder, mesh=mesh("both"), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.decoder)} == {np.dtype(jnp.bfloat16)}
    close(half(TOKENS), load(folder, dtype=jnp.bfloat16)(TOKENS), tolerance=0.05)


def plans(source: SafetensorsFolder, config: dict) -> list[LeafPlan]:
    kind = family(config["model_type"])
    made = make_plan(Decoder.abstract(kind.config(config)), kind, source.entries)
    return [part for plan in made for part in ((plan,) if isinstance(plan, LeafPlan) else (plan.blocks, plan.scales))]


def packed_gpt_oss(folder: Path, hidden_size: int = 64, intermediate_size: int = 128) -> dict:
    """GPT-OSS files with random MXFP4 experts; the sizes are multiples of its blocks of 32.

    Scales are so small that layers do not make much of a rounding.
    """
    config = hugging_face("gpt_oss", hidden_size=hidden_size, intermediate_size=intermediate_size)
    save_folder(random_decoder(config), config, folder)
    source, rng = SafetensorsFolder(folder), np.random.default_rng(0)
    tensors = {key: np.array(source.read(key), ml_dtypes.bfloat16) for key in source.entries}
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = rng.integers(0, 256, (experts, rows, inputs // 32, 16), np.uint8)
        tensors[f"{key}_scales"] = rng.integers(118, 124, (experts, rows, inputs // 32), np.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config


@pytest.mark.parametrize("name", [*FAMILIES, "mxfp4"])
def test_a_part_of_a_leaf_is_the_same_slice_of_the_whole(name: str, tmp_path: Path) -> None:
    config = packed_gpt_oss(tmp_path) if name == "mxfp4" else hugging_face(name)
    if name != "mxfp4":
        published(name, tmp_path)
    source, rng = SafetensorsFolder(tmp_path), np.random.default_rng(0)
    for plan in plans(source, config):
        whole = plan.read(source, None)
        for _ in range(3):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in plan.shape]
            index = tuple(slice(*bound) if rng.random() < 0.7 else slice(None) for bound in bounds)
            part = plan.read(source, None, index)
            assert part.dtype == whole.dtype
            np.testing.assert_array_equal(part, whole[index], err_msg=f"{plan.path} {index}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_experts_load_in_parts(layout: str, tmp_path: Path) -> None:
    packed_gpt_oss(tmp_path)
    whole = load(tmp_path).decoder
    check_parts(load(tmp_path, mesh=mesh(layout), sharding=LAYOUTS[layout][1]).decoder, whole, layout)


class Watched(SafetensorsFolder):
    """A folder that notes how often each tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: Counter[str] = Counter()

    def read(self, key: str) -> np.ndarray:
        self.asked[key] += 1
        return super().read(key)


def test_of_experts_published_one_by_one_a_device_reads_its_own(tmp_path: Path) -> None:
    """Two of eight experts for each of four devices: a quarter of the bytes."""
    source = Watched(published("olmoe", tmp_path))
    leaf = next(p for p in plans(source, hugging_face("olmoe")) if p.path == "layers.1.feed_forward.experts.gate_up")
    placed = shardings(decoder("olmoe"), mesh("expert"))[leaf.path]
    for device, index in placed.addressable_devices_indices_map(leaf.shape).items():
        source.asked.clear()
        leaf.read(source, None, index)
        experts = {int(key.split(".experts.")[1].split(".")[0]) for key in source.asked}
        assert experts == {2 * device.id, 2 * device.id + 1}
        assert sum(source.entries[key].nbytes for key in source.asked) == math.prod(leaf.shape) * 4 // 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_is_read_once_for_each_part_of_it(layout: str, tmp_path: Path) -> None:
    source = Watched(published("qwen3_moe", tmp_path))
    load_decoder(hugging_face("qwen3_moe"), source, mesh=mesh(layout))
    parts = LAYOUTS[layout][0].get("tensor", 1)
    assert [count for key, count in source.asked.items() if ".experts." in key] == [parts] * 3 * 8


@pytest.mark.parametrize(
    ("name", "leaf"), [("jetmoe", "experts.gate_up"), ("jetmoe", "experts.down"), ("gpt_oss", "experts.gate_up")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_one_tensor_is_a_view_of_the_mapped_file(name: str, leaf: str, layout: str, tmp_path: Path) -> None:
    """So the system reads the pages of that part and no others."""
    source = SafetensorsFolder(published(name, tmp_path))
    plan = next(p for p in plans(source, hugging_face(name)) if p.path == f"layers.1.feed_forward.{leaf}")
    placed = shardings(decoder(name), mesh(layout))[plan.path]
    for index in placed.addressable_devices_indices_map(plan.shape).values():
        part = plan.read(source, None, index)
        assert not part.flags.owndata
        assert _mapped(part)
        assert part.shape == placed.shard_shape(plan.shape)


def _mapped(array: np.ndarray | None) -> bool:
    """Return whether the data lie in a mapped file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def peak_of(read: Callable[[], np.ndarray]) -> tuple[int, int]:
    """Bytes of an array and the most that numpy and Python held while it was read."""
    tracemalloc.start()
    try:
        return read().nbytes, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["olmoe", "jetmoe"])
def test_a_part_takes_no_more_memory_than_itself(name: str, tmp_path: Path) -> None:
    config = hugging_face(name, hidden_size=768, intermediate_size=512)
    model = random_decoder(config)
    save_folder(model, config, tmp_path)
    source = SafetensorsFolder(tmp_path)
    plan = next(p for p in plans(source, config) if p.path == "layers.1.feed_forward.experts.gate_up")
    placed = shardings(model, mesh("expert"))[plan.path]
    for index in placed.addressable_devices_indices_map(plan.shape).values():
        part, peak = peak_of(lambda index=index: plan.read(source, None, index))
        assert part == math.prod(plan.shape)  # a quarter of four bytes a value
        # one tensor is not copied at all
        assert peak <= (part if name == "olmoe" else 0) + 2**20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_that_stay_packed_are_split_as_their_values_are(layout: str, tmp_path: Path) -> None:
    packed_gpt_oss(tmp_path)
    alone, spread = (load(tmp_path, keep_packed=True, dtype="float32", **over) for over in ({}, {"mesh": mesh(layout)}))
    for (path, leaf), other in zip(leaf_paths(spread.decoder), jax.tree.leaves(alone.decoder), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
        if ".gate_up." in path:
            assert leaf.addressable_shards[0].data.size == leaf.size // 4, path
    close(spread(TOKENS), alone(TOKENS))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("olmoe", "both"),
        *(pytest.param("olmoe", layout, marks=pytest.mark.slow) for layout in ("expert", "tensor")),
        *(pytest.param(name, layout, marks=pytest.mark.slow) for name in ("gpt_oss", "jetmoe") for layout in LAYOUTS),
    ],
)
def test_int8_experts_are_split_and_compute_the_same(name: str, layout: str, tmp_path: Path) -> None:
    folder, layout_of = published(name, tmp_path), {"mesh": mesh(layout), "sharding": LAYOUTS[layout][1]}
    alone, spread = (load(folder, experts="int8", **over) for over in ({}, layout_of))
    for (path, leaf), other in zip(leaf_paths(spread.decoder), jax.tree.leaves(alone.decoder), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=path)
        if path.endswith(".codes"):
            assert leaf.addressable_shards[0].data.size == leaf.size // 4, path
    assert alone.quantisation is not None
    assert spread.quantisation is not None
    assert spread.quantisation.errors == pytest.approx(alone.quantisation.errors)
    close(spread(TOKENS), alone(TOKENS))
    if layout == "expert":
        ours, theirs = (explain(lm, TOKENS.tolist()) for lm in (spread, alone))
        close(ours.layers, theirs.layers)
