"""The table of logical axes and the rules that use it."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import Mesh
from tiny.four_devices import (
    DENSE,
    EXPERTS,
    FAMILIES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYOUTS,
    MODEL,
    SHARED,
    VOCABULARY,
    decoder,
    hugging_face,
    mesh,
    random_decoder,
)
from tiny.hugging_face import fields

from moejax import EXPERT, EXPERT_TENSOR, TENSOR, ConfigError, load
from moejax.checkpoints.plan import leaf_paths
from moejax.layers import MixtureConfig
from moejax.models import Decoder, ShardingRules, family, shard, shardings
from moejax.ops.experts.matmul import hopper
from moejax.ops.packed import FORMATS

SIZES = {
    "expert": {EXPERTS},
    "heads": {HEADS, HEADS * HEAD_DIM},
    "kv_heads": {KV_HEADS, KV_HEADS * HEAD_DIM},
    "hidden": {HIDDEN, DENSE, SHARED},
    "vocab": {VOCABULARY},
    "model": {MODEL},
}


def four(axis: str) -> Mesh:
    return jax.make_mesh((4,), (axis,))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_of_every_leaf_is_what_its_name_says(family: str) -> None:
    config = decoder(family).config
    for path, leaf in leaf_paths(decoder(family)):
        names = config.axes(path)
        if names is None:
            assert leaf.ndim == 1, f"{path}: only vectors may be without an entry"
            continue
        assert len(names) == leaf.ndim, path
        for name, size in zip(names, leaf.shape, strict=True):
            assert name is None or size in SIZES[name], (path, name, size)


def test_every_entry_of_the_parts_is_some_leaf() -> None:
    """But for biases that no family of these publishes."""
    trees = [*map(decoder, FAMILIES), *(packed_decoder(*which) for which in product(("gpt_oss", "jetmoe"), FORMATS))]
    trees += [Decoder.abstract(family(name).config(fields(name))) for name in ("afmoe", "deepseek_v2", "deepseek_v3")]
    paths = {path.split(".", 2)[-1] for tree in trees for path, _ in leaf_paths(tree) if path.startswith("layers.")}
    entries = {path for tree in trees for block in tree.config.blocks for path in block.axes}
    shared = {f"feed_forward.shared.mlp.{name}_bias" for name in ("gate_up", "down")}
    unpublished = {"attention.router.bias", *shared}
    assert entries - paths == unpublished


def packed_decoder(name: str = "gpt_oss", packed: str = "mxfp4") -> Decoder:
    """A decoder with experts in a packed format, abstract."""
    sizes = {"hidden_size": 96, "intermediate_size": 64} | ({"kv_channels": 8} if name == "jetmoe" else {})
    return Decoder.abstract(family(name).config(hugging_face(name) | sizes).pack(packed))


def test_packed_experts_are_split() -> None:
    placed = shardings(packed_decoder(), jax.make_mesh((2, 2), ("expert", "tensor")))
    for path, leaf in leaf_paths(packed_decoder()):
        if ".gate_up." in path or ".down." in path:
            parts = leaf.size // math.prod(placed[path].shard_shape(leaf.shape))
            assert parts == (4 if "gate_up" in path else 2), path


@pytest.mark.parametrize("name", ["gpt_oss", "jetmoe"])
def test_int8_experts_are_split_as_their_values_are(name: str) -> None:
    """But for the scales of rows that are themselves split: every part of a row has its scale."""
    placed = shardings(packed_decoder(name, "int8"), jax.make_mesh((2, 2), ("expert", "tensor")))
    for path, leaf in leaf_paths(packed_decoder(name, "int8")):
        if path.endswith((".codes", ".row_scales")):
            parts = leaf.size // math.prod(placed[path].shard_shape(leaf.shape))
            assert parts == (2 if path.endswith(("down.row_scales", "output.row_scales")) else 4), path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_leaves_are_split_as_the_rules_say(family: str, layout: str) -> None:
    axes, rules = LAYOUTS[layout]
    placed = shardings(decoder(family), mesh(layout), rules)
    for path, leaf in leaf_paths(decoder(family)):
        part = placed[path].shard_shape(leaf.shape)
        split = {rules[name] for name in decoder(family).config.axes(path) or () if name in rules}
        assert leaf.size // math.prod(part) == math.prod(axes[axis] for axis in split), path
        if path.endswith(("experts.gate_up", "experts.down")):
            assert split, path


def test_by_default_the_rules_are_those_that_the_mesh_has_axes_for() -> None:
    model = decoder("olmoe")
    for layout, (_, rules) in LAYOUTS.items():
        assert shardings(model, mesh(layout)) == shardings(model, mesh(layout), rules)
    with pytest.raises(
        ConfigError, match="the mesh has axes rows; name them 'data', 'expert' or 'tensor', or pass rules"
    ):
        shardings(model, four("rows"))
    assert not any(any(placed.spec) for placed in shardings(model, four("data")).values()), "data share no weights"


def test_an_axis_that_does_not_divide_names_leaf_sizes_and_mend() -> None:
    model = random_decoder(hugging_face("olmoe", num_key_value_heads=2, num_experts=6))
    with pytest.raises(ConfigError) as error:
        shardings(model, four("x"), {"kv_heads": "x", "expert": "x", "heads": "x"})
    message = str(error.value)
    assert "attention.query_key_value.bias: its axis 'kv_heads' of 2 cannot be split over the 4 devices" in message
    assert "its axis 'expert' of 6 cannot be split" in message
    assert "leave 'kv_heads' out of the rules to replicate it" in message
    assert "'heads' of 12" not in message
    mended = shardings(model, four("x"), {"kv_heads": None, "heads": "x"})
    assert mended["layers.0.attention.query_key_value.weight"].is_fully_replicated


def test_wrong_rules_are_refused() -> None:
    model = decoder("olmoe")
    with pytest.raises(ConfigError, match=r"unknown logical axes \['experts'\]; known are: expert, heads"):
        shardings(model, four("expert"), {"experts": "expert"})
    with pytest.raises(ConfigError, match=r"mesh axes \['tensor'\], but the mesh has \['expert'\]"):
        shardings(model, four("expert"), TENSOR)
    with pytest.raises(ConfigError, match=r"layers.0.feed_forward.experts.down .* two of its axes on mesh axis 'x'"):
        shardings(model, four("x"), {"expert": "x", "hidden": "x"})
    with pytest.raises(ConfigError, match="pass mesh="):
        load("tiny-olmoe", sharding=EXPERT)


class Unsplit(MixtureConfig):
    """A mixture of which nothing is ever split."""

    axes = {}  # noqa: RUF012


class Wrong(MixtureConfig):
    """A mixture whose answer does not fit its leaves."""

    axes = {"experts.down": ("expert", "model")}  # noqa: RUF012


def with_mixtures(kind: type[MixtureConfig]) -> Decoder:
    config = decoder("mixtral").config
    blocks = [replace(b, feed_forward=kind(**vars(b.feed_forward))) for b in config.blocks]
    return Decoder.abstract(replace(config, blocks=tuple(blocks)))


def test_parts_say_themselves_how_they_are_split() -> None:
    placed = shardings(with_mixtures(Unsplit), mesh("both"), EXPERT_TENSOR)
    assert placed["layers.1.feed_forward.experts.down"].is_fully_replicated
    assert not placed["layers.1.attention.output.weight"].is_fully_replicated
    with pytest.raises(ConfigError, match=r"feed_forward.experts.down has shape \[8, 50, 20\], but 2 logical axes"):
        shardings(with_mixtures(Wrong), mesh("both"), EXPERT_TENSOR)


@pytest.mark.parametrize(
    ("axes", "rules", "kernel"),
    [
        ({"expert": 4}, EXPERT, True),
        ({"tensor": 4}, TENSOR, False),
        ({"expert": 2, "tensor": 2}, EXPERT_TENSOR, False),
        ({"expert": 2, "tensor": 2}, TENSOR, False),
    ],
    ids=["expert", "tensor", "both", "an axis that splits nothing"],
)
def test_a_kernel_is_not_given_what_xla_splits(
    monkeypatch, axes: dict[str, int], rules: ShardingRules, kernel: bool
) -> None:
    """It cannot be split inside, so that XLA would collect the weights of all devices for it."""
    gpu = SimpleNamespace(compute_capability="9.0", core_count=132)
    monkeypatch.setattr(hopper, "target", lambda *_: gpu)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    placed = shard(decoder("olmoe"), mesh, rules)
    router = placed.layers[1].feed_forward.router.config
    assert router.mesh is not None
    assert hopper.supports_shapes(2, 64, 128, mesh=router.mesh) == kernel
