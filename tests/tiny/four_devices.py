"""Tiny random decoders whose experts, heads, hidden units and vocabulary can be divided among four devices.

:func:`single` is a model on one device, :func:`spread` the same model on four.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import EXPERT, EXPERT_TENSOR, LM, TENSOR
from moejax.models import Decoder, ShardingRules, family, shard
from tiny.decoders import fill
from tiny.hugging_face import fields

EXPERTS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, DENSE, SHARED, VOCABULARY, MODEL = 8, 12, 4, 14, 20, 36, 28, 88, 50

_HEADS = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
_YARN = {"rope_type": "yarn", "rope_theta": 1500.0, "factor": 8.0, "truncate": False}
_EXPERTS = {"num_experts": EXPERTS}
_LOCAL_EXPERTS = {"num_local_experts": EXPERTS}

_CHANGES: dict[str, dict[str, Any]] = {
    "olmoe": {**_HEADS, **_ROPE, **_EXPERTS, "attention_bias": True},
    "qwen3_moe": {**_HEADS, **_ROPE, **_EXPERTS, "mlp_only_layers": [0]},
    "qwen2_moe": {**_HEADS, **_ROPE, **_EXPERTS, "decoder_sparse_step": 1},
    "mixtral": {**_HEADS, **_ROPE, **_LOCAL_EXPERTS, "sliding_window": None},
    "gpt_oss": {
        **_HEADS,
        **_LOCAL_EXPERTS,
        "swiglu_alpha": 1.702,
        "max_position_embeddings": 131_072,
        "rope_parameters": {**_YARN, "original_max_position_embeddings": 32},
    },
    "jetmoe": {
        **_ROPE,
        **_LOCAL_EXPERTS,
        "num_attention_heads": 2 * KV_HEADS,
        "num_key_value_heads": KV_HEADS,
        "kv_channels": HEAD_DIM,
        "rms_norm_eps": 1e-6,
    },
    "llama": {**_HEADS, **_ROPE},
}
"""Fields of the families that differ from those of :mod:`tiny.hugging_face`, so that sizes divide by four."""

_MOEJAX = {
    **_HEADS,
    **_ROPE,
    **_EXPERTS,
    "intermediate_size": HIDDEN,
    "moe": "smoe",
    "moe_args": {"expert_bias": True},
    "num_experts_per_tok": 2,
}
"""A decoder with a registered layer."""

FAMILIES = sorted([*_CHANGES, "moejax"])

LAYOUTS: dict[str, tuple[dict[str, int], ShardingRules]] = {
    "expert": ({"expert": 4}, EXPERT),
    "tensor": ({"tensor": 4}, TENSOR),
    "both": ({"expert": 2, "tensor": 2}, EXPERT_TENSOR),
}
WITH_DATA: dict[str, tuple[dict[str, int], ShardingRules]] = {
    "data": ({"data": 4}, {}),
    "data and expert": ({"data": 2, "expert": 2}, EXPERT),
    "data and tensor": ({"data": 2, "tensor": 2}, TENSOR),
}
"""Layouts in which devices also divide the sequences of a batch."""


def hugging_face(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of the ``config.json`` of a family, or of a decoder with a registered layer (``moejax``)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": MODEL, "num_hidden_layers": 2}
    if name == "moejax":
        return {"model_type": name, "pad_token_id": 0, **sizes, **_MOEJAX, **changes}
    return fields(name, **(sizes | _CHANGES[name] | changes))


def random_decoder(config: dict[str, Any]) -> Decoder:
    """Weights large enough for mistakes to show; biases and norms are random too, around one."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return (len(shape) == 1) + 0.2 * rng.normal(size=shape)

    return fill(family(config["model_type"]).config(config), draw)


@cache
def decoder(name: str) -> Decoder:
    """A decoder on one device."""
    return random_decoder(hugging_face(name))


def mesh(layout: str) -> Mesh:
    """The mesh of the four devices for a layout, made as users make it."""
    axes, _ = (LAYOUTS | WITH_DATA)[layout]
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


@cache
def single(name: str) -> LM:
    """A model on one device."""
    return LM(decoder(name))


@cache
def spread(name: str, layout: str) -> LM:
    """The same model over four devices, in one of the layouts."""
    return LM(shard(decoder(name), mesh(layout), (LAYOUTS | WITH_DATA)[layout][1]))
