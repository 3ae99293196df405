"""GPT-OSS as published, in MXFP4, loads to the leaves of its dequantised twin."""

import jax
import ml_dtypes
import numpy as np

from moejax.checkpoints import load_decoder, to_tensors
from moejax.checkpoints.safetensors import Entry
from moejax.models import Decoder, family
from moejax.ops.mxfp4 import dequantise

CONFIG = {
    "model_type": "gpt_oss",
    "vocab_size": 11,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "quantization_config": {"quant_method": "mxfp4"},
}


class InMemory:
    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.entries = {key: Entry(t.shape, t.dtype) for key, t in tensors.items()}

    def read(self, key: str) -> np.ndarray:
        return self._tensors[key]


def value(nibble: int, scale: int) -> float:
    """One number of the format: sign, two bits of exponent with bias 1, one bit of mantissa; times a power of two."""
    exponent, mantissa = (nibble >> 1) & 3, nibble & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return (-1) ** (nibble >> 3) * magnitude * 2.0 ** (scale - 127)


def test_every_byte_and_scale() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    for scale in (1, 100, 127, 128, 200):
        got = dequantise(blocks, np.full((16, 1), scale, np.uint8)).astype(np.float64)
        expected = [[value(n, scale) for byte in row[0] for n in (byte & 15, byte >> 4)] for row in blocks.tolist()]
        np.testing.assert_array_equal(got, expected)


def test_packed_checkpoint_equals_its_twin() -> None:
    rng = np.random.default_rng(0)
    abstract = Decoder.abstract(family("gpt_oss").config(CONFIG))
    random = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(ml_dtypes.bfloat16), abstract)
    plain = to_tensors(random)
    packed = dict(plain)
    for name, rows, width in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        key = f"model.layers.0.mlp.experts.{name}"
        blocks = rng.integers(0, 256, (3, rows, width // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 130, (3, rows, width // 32), dtype=np.uint8)
        packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        del packed[key]
        # transformers holds the dequantised rows transposed
        plain[key] = np.ascontiguousarray(dequantise(blocks, scales).transpose(0, 2, 1))
    ours, twin = load_decoder(CONFIG, InMemory(packed)), load_decoder(CONFIG, InMemory(plain))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(twin), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
