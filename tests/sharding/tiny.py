"""Tiny random decoders of every family, whose experts, heads, hidden units and vocabulary split over four devices."""

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import EXPERT, EXPERT_TENSOR, LM, TENSOR
from moejax.models import Decoder, Rules, family, shard

EXPERTS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, DENSE, SHARED, VOCABULARY, MODEL = 8, 12, 4, 14, 20, 36, 28, 88, 50

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": MODEL, "num_hidden_layers": 2, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
_YARN = {"rope_type": "yarn", "rope_theta": 1500.0, "factor": 8.0, "truncate": False}

CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {
        **_ATTENTION,
        **_ROPE,
        "attention_bias": True,
        "intermediate_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "clip_qkv": 0.7,
    },
    "qwen3_moe": {
        **_ATTENTION,
        **_ROPE,
        "intermediate_size": DENSE,
        "moe_intermediate_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        **_ATTENTION,
        **_ROPE,
        "intermediate_size": DENSE,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": SHARED,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
    },
    "mixtral": {
        **_ATTENTION,
        **_ROPE,
        "intermediate_size": HIDDEN,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        **_ATTENTION,
        "intermediate_size": HIDDEN,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "swiglu_limit": 1.1,
        "rope_parameters": {**_YARN, "original_max_position_embeddings": 32},
    },
    "jetmoe": {
        **_ROPE,
        "num_attention_heads": 2 * KV_HEADS,
        "num_key_value_heads": KV_HEADS,
        "kv_channels": HEAD_DIM,
        "intermediate_size": HIDDEN,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "moejax": {
        **_ATTENTION,
        **_ROPE,
        "intermediate_size": HIDDEN,
        "moe": "smoe",
        "moe_args": {"expert_bias": True},
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "llama": {**_ATTENTION, **_ROPE, "attention_bias": True, "mlp_bias": True, "intermediate_size": DENSE},
}
FAMILIES = sorted(CONFIGS)

LAYOUTS: dict[str, tuple[dict[str, int], Rules]] = {
    "expert": ({"expert": 4}, EXPERT),
    "tensor": ({"tensor": 4}, TENSOR),
    "both": ({"expert": 2, "tensor": 2}, EXPERT_TENSOR),
}
WITH_DATA: dict[str, tuple[dict[str, int], Rules]] = {
    "data": ({"data": 4}, {}),
    "data and expert": ({"data": 2, "expert": 2}, EXPERT),
    "data and tensor": ({"data": 2, "tensor": 2}, TENSOR),
}
"""Layouts in which devices share what is independent."""


def hugging_face(name: str, **changes: Any) -> dict[str, Any]:
    """The config as it would be published."""
    return {"model_type": name, **_COMMON, **CONFIGS[name], **changes}


def random_decoder(config: dict[str, Any]) -> Decoder:
    """Weights large enough for mistakes to show; biases and norms are random too."""
    abstract = Decoder.abstract(family(config["model_type"]).config(config))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(0)
    around = [1.0 if leaf.ndim == 1 else 0.0 for leaf in leaves]
    return tree.unflatten(
        [
            jax.numpy.asarray(a + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)
            for a, leaf in zip(around, leaves, strict=True)
        ]
    )


@cache
def decoder(name: str) -> Decoder:
    """A decoder on one device."""
    return random_decoder(hugging_face(name))


def mesh(layout: str) -> Mesh:
    """The four devices as a layout wants them, made as users make them."""
    axes, _ = (LAYOUTS | WITH_DATA)[layout]
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


@cache
def single(name: str) -> LM:
    """A model on one device."""
    return LM(decoder(name))


@cache
def spread(name: str, layout: str) -> LM:
    """The same model over four."""
    return LM(shard(decoder(name), mesh(layout), (LAYOUTS | WITH_DATA)[layout][1]))


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(initial=0))
