"""Published architectures, and decoders of their shapes with random weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, PRNGKeyArray

from moejax.checkpoints.plan import leaf_paths
from moejax.errors import MoejaxError
from moejax.models import Config, Decoder, family
from moejax.ops.packed import is_packed

OLMOE_1B_7B = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}
JETMOE_8B = {
    "model_type": "jetmoe",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "kv_channels": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": OLMOE_1B_7B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-20b-packed": GPT_OSS_20B,
    "jetmoe-8b": JETMOE_8B,
}
"""Fields of the Hugging Face configs of published models; names that end with "packed" keep the experts in MXFP4."""

TOY = {"vocab_size": 503, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
"""Fields that make any of them small."""


def published(name: str, *, toy: bool = False) -> Config:
    """The architecture of a published model; with ``toy``, a small one of the same family.

    Raises:
        MoejaxError: the name is unknown.
    """
    if name not in SHAPES:
        raise MoejaxError(f"no published shape is called {name!r}; there are {', '.join(SHAPES)}.")
    shape: dict[str, Any] = SHAPES[name] | (TOY if toy else {})
    config = family(shape["model_type"]).config(shape)
    return config.pack() if name.endswith("packed") else config


def random_decoder(config: Config) -> Decoder:
    """A decoder with random weights in bfloat16 and in packed formats, drawn leaf by leaf to save memory.

    An embedding of unit variance and small output projections keep the residual streams of different tokens apart, so
    that routers spread them as a trained model's routers do; otherwise a few experts would get nearly every token.
    """
    abstract = Decoder.abstract(config, jnp.bfloat16)
    filled: list[jax.Array] = []
    for i, (path, leaf) in enumerate(leaf_paths(abstract, is_leaf=is_packed)):
        filled += jax.tree.leaves(random_leaf(config, i, path, leaf))
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def random_leaf(config: Config, number: int, path: str, leaf: Any) -> Any:
    """The leaf of :func:`random_decoder` at ``path``, the one of that number; packed matrices as a whole."""
    if is_packed(leaf):
        return type(leaf).random(jax.random.key(number), leaf.shape)
    bias = path.endswith("bias")
    if bias or leaf.ndim == 1:  # norms are ones; biases are zeros, since they would add the same vector to all tokens
        return jnp.full(leaf.shape, 0 if bias else 1, leaf.dtype)
    is_output = path.endswith(("attention.output.weight", ".down"))
    scale = 1.0 if path == "embedding" else 0.02 / (2 * config.num_layers) ** 0.5 if is_output else 0.02
    return _normal(jax.random.fold_in(jax.random.key(0), number), leaf.shape) * scale


@partial(jax.jit, static_argnums=1)
def _normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> BFloat16[Array, "..."]:
    return jax.random.normal(key, shape, jnp.bfloat16)
