"""A family as a stranger writes it: latent attention, sigmoid routing in groups, shared experts (as DeepSeek-V3 has).

Nothing of the package is edited for it: this file stands outside, uses the decorators, and is loaded by ``--plugin``
or by an import. Equations: DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers import (
    GLU,
    ActivationSizes,
    Aux,
    Axes,
    BlockConfig,
    Call,
    Linear,
    MixtureConfig,
    MLPConfig,
    PartConfig,
    RMSNorm,
    Rotary,
    RouterConfig,
    SharedConfig,
    Sizes,
)
from moejax.layers.attention.grouped_query import read_edges
from moejax.layers.rotary import turn
from moejax.models import Config, Fields, register_family
from moejax.models.keys import KeyTable, Layout, Source, merged_halves, per_expert, stacked, whole
from moejax.models.kinds import ACTIVATION, EPSILON, NUMBER, integer
from moejax.ops.attention import attention
from moejax.ops.rope import Rope

MODEL_TYPE = "stranger_v3"


@dataclass(frozen=True)
class LatentAttentionConfig(PartConfig):
    """Attention whose keys and values are made from one latent vector of each token.

    Attributes:
        num_heads: ``H``.
        plain_dim, rotary_dim, value_dim: widths of a head's query part that does not rotate (``N``), of the part that
            does (``R``), and of its values (``V``).
        latent_dim: width of the latent (``Z``).
    """

    model_dim: int
    num_heads: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    latent_dim: int
    rope: Rope

    @property
    def sizes(self) -> Sizes:
        return Sizes(num_heads=self.num_heads, num_kv_heads=self.num_heads, head_dim=self.value_dim)

    @property
    def rotary(self) -> Rotary:
        return Rotary(self.rope, self.rotary_dim)

    @property
    def axes(self) -> Mapping[str, Axes]:
        return {
            "query.weight": ("heads", None, "model"),
            "latent.weight": (None, "model"),
            "up.weight": ("heads", None, None),
            "output.weight": ("model", "heads"),
        }

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> "LatentAttention":
        c, (k1, k2, k3, k4) = self, jax.random.split(key, 4)
        linear = partial(Linear.init, bias=False, dtype=dtype)
        return LatentAttention(
            linear(k1, c.model_dim, (c.num_heads, c.plain_dim + c.rotary_dim)),
            linear(k2, c.model_dim, c.latent_dim + c.rotary_dim),
            RMSNorm.init(c.latent_dim, 1e-6, dtype),
            linear(k3, c.latent_dim, (c.num_heads, c.plain_dim + c.value_dim)),
            linear(k4, c.num_heads * c.value_dim, c.model_dim),
            c,
        )

    def init_cache(self, batch: int, positions: int, dtype: DTypeLike) -> "Latents":
        widths = self.latent_dim, self.rotary_dim
        return Latents(*(jnp.zeros((batch, positions, width), dtype) for width in widths))

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        width = self.plain_dim + self.rotary_dim + self.value_dim
        return ActivationSizes(4 * batch * tokens * self.num_heads * width, 3 * batch * self.num_heads * tokens**2)


class Latents(NamedTuple):
    """The cache: a latent and a rotated key for all heads, for each cache position."""

    latent: Float[Array, "B S Z"]
    rotated: Float[Array, "B S R"]


@nnx.dataclass
class LatentAttention(nnx.Module):
    """``softmax(q k^T) v`` with ``[k; v] = up(norm(latent(x)))`` and one rotated key part for all heads."""

    query: Linear = nnx.data()
    latent: Linear = nnx.data()
    latent_norm: RMSNorm = nnx.data()
    up: Linear = nnx.data()
    output: Linear = nnx.data()
    config: LatentAttentionConfig = nnx.static()

    def run(
        self, x: Float[Array, "B T D"], call: Call, cache: Latents | None = None
    ) -> tuple[Float[Array, "B T D"], Latents, Aux]:
        """The output, and the latents of all tokens so far."""
        c, reading = self.config, call.reading
        q_plain, q_rotated = jnp.split(self.query(x, reading), [c.plain_dim], axis=-1)
        q_rotated = turn(q_rotated, call.rotation)
        latent, rotated = jnp.split(self.latent(x, reading), [c.latent_dim], axis=-1)
        latents = Latents(self.latent_norm(latent, reading), turn(rotated[:, :, None], call.rotation)[:, :, 0])
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=call.start, axis=1)
            latents = jax.tree.map(lambda held, new: write(held, new.astype(held.dtype)), cache, latents)
        k_plain, v = jnp.split(self.up(latents.latent, reading), [c.plain_dim], axis=-1)
        k_rotated = jnp.broadcast_to(latents.rotated[:, :, None], (*k_plain.shape[:-1], c.rotary_dim))
        q, k = jnp.concatenate([q_plain, q_rotated], -1), jnp.concatenate([k_plain, k_rotated], -1)

        def product(q: Array, k: Array, v: Array, temperature: float = 1.0) -> Array:
            scale = q.shape[-1] ** -0.5 / temperature
            edges = reading.edges() if temperature == 1 else None
            return attention(q, k, v, call.mask, scale=scale, edges=edges, causal=cache is None)

        read_edges(reading, product, q, k)
        heads = reading.book("softmax", partial(reading.rule.attention, product), q, k, v)
        heads = reading.gate("heads", heads)
        return self.output(heads.reshape(*x.shape[:2], -1), reading), latents, Aux()


def rows(key: str) -> Source:
    """One tensor ``[H C, ..]`` for a leaf ``[H, C, ..]``."""
    return lambda shape: Layout([(key, (shape[0] * shape[1], *shape[2:]))])


_LAYER = "model.layers.{layer}."
_OURS = "layers.{layer}."
_MLP, _ATTENTION = _LAYER + "mlp.", _LAYER + "self_attn."
_ONE = _MLP + "experts.{expert}."

KEYS: KeyTable = {
    "embedding": [whole("model.embed_tokens.weight")],
    "head": [whole("lm_head.weight")],
    "norm.weight": [whole("model.norm.weight")],
    _OURS + "attention_norm.weight": [whole(_LAYER + "input_layernorm.weight")],
    _OURS + "feed_forward_norm.weight": [whole(_LAYER + "post_attention_layernorm.weight")],
    _OURS + "attention.query.weight": [rows(_ATTENTION + "q_proj.weight")],
    _OURS + "attention.latent.weight": [whole(_ATTENTION + "kv_a_proj_with_mqa.weight")],
    _OURS + "attention.latent_norm.weight": [whole(_ATTENTION + "kv_a_layernorm.weight")],
    _OURS + "attention.up.weight": [rows(_ATTENTION + "kv_b_proj.weight")],
    _OURS + "attention.output.weight": [whole(_ATTENTION + "o_proj.weight")],
    _OURS + "feed_forward.gate_up": [stacked(_MLP + "gate_proj.weight", _MLP + "up_proj.weight")],
    _OURS + "feed_forward.down": [whole(_MLP + "down_proj.weight")],
    _OURS + "feed_forward.router.weight": [whole(_MLP + "gate.weight")],
    _OURS + "feed_forward.router.selection_bias": [whole(_MLP + "gate.e_score_correction_bias")],
    _OURS + "feed_forward.experts.gate_up": [
        per_expert(_ONE + "gate_proj.weight", _ONE + "up_proj.weight"),
        merged_halves(_MLP + "experts.gate_up_proj"),
    ],
    _OURS + "feed_forward.experts.down": [per_expert(_ONE + "down_proj.weight"), whole(_MLP + "experts.down_proj")],
    _OURS + "feed_forward.shared.mlp.gate_up": [
        stacked(_MLP + "shared_experts.gate_proj.weight", _MLP + "shared_experts.up_proj.weight")
    ],
    _OURS + "feed_forward.shared.mlp.down": [whole(_MLP + "shared_experts.down_proj.weight")],
}


@register_family(MODEL_TYPE, KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``DeepseekV3Config`` with half-split rotation and without query compression."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    eps = fields("rms_norm_eps", EPSILON, 1e-6)
    for name, value in {
        "q_lora_rank": None,
        "rope_interleave": False,
        "attention_bias": False,
        "pretraining_tp": 1,
    }.items():
        fields.must_be(name, value)
    fields.without_effect("num_key_value_heads", "head_dim", "qk_head_dim", "num_nextn_predict_layers")
    attention = LatentAttentionConfig(
        dim,
        heads,
        fields.size("qk_nope_head_dim"),
        fields.size("qk_rope_head_dim"),
        fields.size("v_head_dim"),
        fields.size("kv_lora_rank"),
        fields.rope(),
    )
    unit, width = GLU(fields("hidden_act", ACTIVATION, "silu")), fields.size("moe_intermediate_size")
    router = RouterConfig(
        fields.size("n_routed_experts"),
        fields.size("num_experts_per_tok"),
        score="sigmoid",
        weigh="renormalised" if fields.flag("norm_topk_prob", True) else "raw",
        scale=fields("routed_scaling_factor", NUMBER, 2.5),
        selection_bias=True,
        num_groups=fields.size("n_group", 8),
        num_selected_groups=fields.size("topk_group", 4),
        group_score="top2",
    )
    shared = SharedConfig(width * fields.size("n_shared_experts", 1), unit)
    mixture = MixtureConfig(dim, width, router, unit, shared=shared)
    dense = MLPConfig(dim, fields.size("intermediate_size"), unit)
    first = fields("first_k_dense_replace", integer(0, 10_000), 3)
    layers = fields.size("num_hidden_layers")
    return Config(
        model_type=MODEL_TYPE,
        blocks=tuple(BlockConfig(attention, dense if i < first else mixture, eps) for i in range(layers)),
        norm_eps=eps,
        **fields.common(max_positions=4096),
    )


def tiny(**changes: Any) -> dict[str, Any]:
    """Fields of a tiny model whose sizes all differ; experts, heads and hidden units split over four devices."""
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": 88,
        "hidden_size": 50,
        "intermediate_size": 36,
        "moe_intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "kv_lora_rank": 18,
        "q_lora_rank": None,
        "rope_interleave": False,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 777.0,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    } | changes
