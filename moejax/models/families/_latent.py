"""What DeepSeek's families share: latent attention, and dense layers before the mixtures."""

import math

from moejax.layers import GLU, BlockConfig, LatentAttentionConfig, MixtureConfig, MLPConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import ATTENTION, DENSE, OUTER, experts, shared_experts, ungated_shared
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, merged_heads, whole
from moejax.models.kinds import ACTIVATION, number

_OURS = "layers.{layer}.attention."

LATENT: KeyTable = {
    _OURS + "query_up.weight": [merged_heads(ATTENTION + "q_b_proj.weight")],
    _OURS + "query.weight": [merged_heads(ATTENTION + "q_proj.weight")],
    _OURS + "query_norm.weight": [whole(ATTENTION + "q_a_layernorm.weight")],
    _OURS + "latent_norm.weight": [whole(ATTENTION + "kv_a_layernorm.weight")],
    _OURS + "key_value.weight": [merged_heads(ATTENTION + "kv_b_proj.weight")],
    **{
        f"{_OURS}{ours}.{part}": [whole(f"{ATTENTION}{theirs}.{part}")]
        for part in ("weight", "bias")
        for ours, theirs in (
            ("query_latent", "q_a_proj"),
            ("latent", "kv_a_proj_with_mqa"),
            ("output", "o_proj"),
        )
    },
}
"""Latent attention."""

KEYS: KeyTable = {**OUTER, **LATENT, **DENSE, **experts(), **shared_experts()}
"""All leaves but a router's bias."""


def latent_attention(
    fields: Fields, *, query_dim: int, plain_dim: int = 128, value_dim: int = 128
) -> LatentAttentionConfig:
    """Latent attention with the sizes under their usual names; the numbers are defaults.

    YaRN with ``mscale_all_dim`` multiplies the scores by the square of its factor.
    """
    plain, rotary = fields.size("qk_nope_head_dim", plain_dim), fields.size("qk_rope_head_dim", 64)
    fields.without_effect("qk_head_dim", "head_dim")  # as the two above say
    stretch, slope = fields.rope_number("factor"), fields.rope_number("mscale_all_dim", number(zero=True))
    magnitude = 0.1 * slope * math.log(stretch) + 1 if stretch is not None and stretch > 1 and slope else 1.0
    heads = fields.size("num_attention_heads")
    fields.without_effect("num_key_value_heads")  # every head has its own keys and values
    return LatentAttentionConfig(
        model_dim=fields.size("hidden_size"),
        num_heads=heads,
        plain_dim=plain,
        rotary_dim=rotary,
        value_dim=fields.size("v_head_dim", value_dim),
        latent_dim=fields.size("kv_lora_rank", 512),
        query_dim=fields.size_or_none("q_lora_rank", query_dim),
        rope=fields.rope(),
        rotates_neighbours=fields.flag("rope_interleave", True),
        scale=(plain + rotary) ** -0.5 * magnitude**2,
        bias=fields.flag("attention_bias", False),
    )


def deepseek(
    fields: Fields,
    model_type: str,
    router: RouterConfig,
    attention: LatentAttentionConfig,
    dense: list[bool],
    *,
    eps: float,
    expert_dim: int,
    shared: int,
    max_positions: int,
) -> Config:
    """A decoder of latent attention and mixtures; ``dense`` names the layers without experts, the rest are defaults."""
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    fields.without_effect("pretraining_tp", "aux_loss_alpha", "seq_aux", "ep_size")  # training only
    size = fields.size("moe_intermediate_size", expert_dim)
    moe = MixtureConfig(attention.model_dim, size, router, glu, shared=ungated_shared(fields, glu, default=shared))
    plain = MLPConfig(attention.model_dim, fields.size("intermediate_size"), glu)
    return Config(
        model_type=model_type,
        blocks=tuple(BlockConfig(attention, plain if is_dense else moe, eps) for is_dense in dense),
        norm_eps=eps,
        **fields.common(max_positions=max_positions),
    )
