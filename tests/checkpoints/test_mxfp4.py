"""GPT-OSS as it is published: experts in MXFP4."""

import json
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import moejax
from moejax.checkpoints.doctor import examine
from moejax.checkpoints.verify import verify
from moejax.models import family
from moejax.ops import mxfp4
from moejax.ops.mxfp4 import MXFP4

from . import tiny
from .compare import raw, same_leaves

_LARGEST = Fraction(2) ** 127 * Fraction(255, 128)


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values in bfloat16, as a device unpacks them."""
    return np.asarray(MXFP4(jnp.asarray(blocks), jnp.asarray(scales)).unpack(jnp.bfloat16))


def scalar(nibble: int, scale: int) -> float:
    """One value from its bits, as the format defines it: sign, two bits of exponent, one of mantissa."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    value = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * Fraction(2) ** (exponent - 1)
    value *= Fraction(2) ** (scale - 127)
    result = float("inf") if value > _LARGEST else float(value)
    return -result if sign else result


def _same(values: np.ndarray, expected: list[float]) -> bool:
    return values.astype(np.float64).tobytes() == np.array(expected, np.float64).tobytes()


@pytest.mark.parametrize("scale", [0, 1, 2, 63, 126, 127, 128, 190, 252, 253, 254])
def test_every_byte(scale: int) -> None:
    """Values are equal bit for bit, also -0, subnormal values and values that overflow."""
    values = dequantise(np.arange(256, dtype=np.uint8).reshape(16, 16), np.full(16, scale, np.uint8))
    assert values.dtype == ml_dtypes.bfloat16
    assert values.shape == (512,)
    assert _same(values, [scalar(nibble, scale) for byte in range(256) for nibble in (byte & 15, byte >> 4)])


def test_nan_scale_gives_nothing_finite() -> None:
    values = dequantise(np.arange(256, dtype=np.uint8).reshape(16, 16), np.full(16, 255, np.uint8))
    assert not np.isfinite(values.astype(np.float32)).any()


def test_multiplying_is_another_way_to_the_same_bits() -> None:
    """GPUs unpack by multiplication. A CPU flushes subnormal numbers, so scales below 2^-126 may be lost there."""
    blocks = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8).reshape(16, 16), (256, 16, 16))
    scales = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8)[:, None], (256, 16))
    bits, product = (
        np.asarray(of(blocks, scales)) for of in (mxfp4._unpack_by_bits, jax.jit(mxfp4._unpack_by_multiplying))
    )
    assert bits[2:255].tobytes() == product[2:255].tobytes()
    assert np.allclose(bits[:2].astype(np.float64), product[:2].astype(np.float64), rtol=0, atol=2.0**-124)
    assert not np.isfinite(product[255].astype(np.float32)).any()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_any_shape(experts: int, rows: int, count: int, random) -> None:
    codes = [[random.randrange(256) for _ in range(16)] for _ in range(experts * rows * count)]
    scales = [random.randrange(255) for _ in codes]
    values = dequantise(
        np.array(codes, np.uint8).reshape(experts, rows, count, 16),
        np.array(scales, np.uint8).reshape(experts, rows, count),
    )
    assert values.shape == (experts, rows, count * 32)
    flat = [(b >> shift & 15, s) for block, s in zip(codes, scales, strict=True) for b in block for shift in (0, 4)]
    assert _same(values.reshape(-1), [scalar(*pair) for pair in flat])


def test_transformers_decodes_alike() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 10, 2, 16)).astype(np.uint8)
    scales = rng.integers(100, 140, (3, 10, 2)).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(codes), torch.from_numpy(scales))
    assert np.array_equal(dequantise(codes, scales).astype(np.float32).transpose(0, 2, 1), theirs.float().numpy())


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A tiny GPT-OSS whose experts are blocks and scales, under the published keys."""
    model = tiny.make("gpt_oss", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "dense")
    tensors, rng = load_file(tmp_path / "dense" / "model.safetensors"), np.random.default_rng(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(key).shape
        shape = (experts, rows, width // 32)
        tensors[f"{key}_blocks"] = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
        tensors[f"{key}_scales"] = rng.integers(121, 125, shape).astype(np.uint8)
    folder = tmp_path / "packed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_packed_source_converts_and_exports_in_full(packed: Path, tmp_path: Path) -> None:
    moejax.convert(packed, tmp_path / "orbax", progress=False)
    moejax.export(tmp_path / "orbax", tmp_path / "full", progress=False)
    moejax.export(packed, tmp_path / "direct", progress=False)
    assert raw(tmp_path / "full") == raw(tmp_path / "direct")
    assert {dtype for dtype, _, _ in raw(tmp_path / "full").values()} == {"bfloat16"}
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())
    key, leaf = (
        "model.layers.1.mlp.experts.gate_up_proj",
        moejax.load(packed).decoder.layers[1].feed_forward.experts.gate_up,
    )
    blocks, scales = (load_file(packed / "model.safetensors")[f"{key}_{part}"] for part in ("blocks", "scales"))
    row = dequantise(blocks, scales)
    assert np.array_equal(np.asarray(leaf[:, 0]), row[:, 0::2])
    assert np.array_equal(np.asarray(leaf[:, 1]), row[:, 1::2])
    assert same_leaves(moejax.load(packed).decoder, moejax.load(tmp_path / "full").decoder)


def test_packed_source_computes_what_transformers_does(packed: Path) -> None:
    report = verify(packed)
    assert report.passed, report
    assert report.routing_agreement == (1.0, 1.0)


def test_a_packed_weight_that_is_not_finite(packed: Path, tmp_path: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][3, 2, 1] = 255
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(moejax.CheckpointError, match=r"layers\.0\.mlp\.experts\.down_proj_blocks' \(32\)"):
        moejax.convert(packed, tmp_path / "out", progress=False)


TOKENS = np.random.default_rng(1).integers(1, 90, (2, 11))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_kept_packed_computes_the_same(packed: Path, dtype: str) -> None:
    """Forward passes of many tokens and of one token agree, and so does relevance; experts take 4.25 bits a value."""
    full, kept = (moejax.load(packed, dtype=dtype, keep_packed=keep) for keep in (False, True))
    experts = kept.decoder.layers[1].feed_forward.experts
    assert {leaf.dtype.name for leaf in jax.tree.leaves((experts.gate_up, experts.down))} == {"uint8"}
    assert kept.decoder.embedding.dtype == dtype
    values = sum(int(np.prod(weight.shape)) for weight in (experts.gate_up, experts.down))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves((experts.gate_up, experts.down))) == values * 17 // 32
    assert np.array_equal(full(TOKENS), kept(TOKENS))
    if dtype == "float32":
        return  # the rest once
    prompt = TOKENS[0].tolist()
    assert full.generate_ids([prompt], max_new_tokens=8) == kept.generate_ids([prompt], max_new_tokens=8)
    ours, theirs = (moejax.explain(model, prompt) for model in (kept, full))
    assert np.array_equal(ours.experts, theirs.experts)
    assert np.array_equal(ours.tokens, theirs.tokens)


def test_kept_packed_is_written_as_it_was(packed: Path, tmp_path: Path) -> None:
    moejax.export(moejax.load(packed, keep_packed=True), tmp_path / "again", progress=False)
    assert raw(tmp_path / "again") == raw(packed)
    assert "quantization_config" in json.loads((tmp_path / "again" / "config.json").read_text())


def test_kept_packed_is_written_in_full_on_request(packed: Path, tmp_path: Path) -> None:
    moejax.export(moejax.load(packed, keep_packed=True), tmp_path / "full", dequantise=True, progress=False)
    assert same_leaves(moejax.load(tmp_path / "full").decoder, moejax.load(packed).decoder)
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())


def test_mxfp4_experts_can_be_held_as_int8(packed: Path) -> None:
    lm = moejax.load(packed, experts="int8")
    assert lm.config.packed == "int8"
    assert lm.quantisation is not None
    assert all(0 < error < 0.02 for error in lm.quantisation.errors.values())


def test_experts_are_taken_from_a_packed_array() -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (5, 2, 8, 16), np.uint8), rng.integers(0, 255, (5, 2, 8), np.uint8)
    packed = MXFP4(jnp.asarray(codes), jnp.asarray(scales))
    assert packed.shape == (5, 2, 256)
    assert np.array_equal(packed[jnp.array([3, 1])].unpack(jnp.bfloat16), dequantise(codes, scales)[[3, 1]])


def test_what_cannot_be_kept_packed(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(moejax.CheckpointError, match=r"missing model\.layers\.0.mlp\.experts\.gate_up_proj_blocks"):
        moejax.load(packed.parent / "dense", keep_packed=True)
    with pytest.raises(moejax.ConfigError, match="olmoe is not published with MXFP4"):
        moejax.load("tiny-olmoe", keep_packed=True)
    moejax.convert(packed, tmp_path / "orbax", progress=False)
    with pytest.raises(moejax.CheckpointError, match="stored in full"):
        moejax.load(tmp_path / "orbax", keep_packed=True)
    with pytest.raises(moejax.ConfigError, match="blocks have 32 values"):
        family("gpt_oss").config(json.loads((packed / "config.json").read_text()) | {"intermediate_size": 20}).pack()


def test_doctor_counts_what_stays_packed(packed: Path) -> None:
    kept = moejax.load(packed, keep_packed=True)
    *_, column = examine(packed, dtype="bfloat16")["memory"]
    assert column["dtype"] == "bfloat16, packed experts"
    assert column["total"] == sum(leaf.nbytes for leaf in jax.tree.leaves(kept.decoder))
    experts = jax.tree.leaves(kept.decoder.layers[0].feed_forward.experts)
    assert column["layers"][0]["experts"] == sum(leaf.nbytes for leaf in experts)
    names = [column["dtype"] for column in examine("tiny-olmoe")["memory"]]
    assert names == ["float32", "bfloat16", "bfloat16, int8 experts"]
