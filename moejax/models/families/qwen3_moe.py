"""Qwen3-MoE (Yang et al., arXiv 2505.09388; ``modeling_qwen3_moe.py`` of transformers).

Queries and keys are normalised head by head before rotation; some layers may be dense. The published checkpoints set
``norm_topk_prob``, although its default is off.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, experts, grouped_query, softmax_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE, **experts()}


@register_family("qwen3_moe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``Qwen3MoeConfig``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    fields.no_window(layers)
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-6), fields.flag("attention_bias", False)
    attention = grouped_query(fields, eps, kv_heads=4, qk_norm="head", bias=bias, output_bias=bias)
    router = softmax_router(fields, experts=128, selected=8)
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    moe = MixtureConfig(dim, fields.size("moe_intermediate_size"), router, glu)
    dense = MLPConfig(dim, fields.size("intermediate_size"), glu)
    return Config(
        model_type="qwen3_moe",
        blocks=tuple(BlockConfig(attention, moe if is_moe else dense, eps) for is_moe in fields.are_mixtures(layers)),
        norm_eps=eps,
        **fields.common(max_positions=32768),
    )
