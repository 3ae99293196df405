"""Qwen3-MoE (Yang et al., arXiv 2505.09388; ``modeling_qwen3_moe.py`` of transformers).

Queries and keys are normalised head by head before rotation; some layers may be dense. The published checkpoints set
``norm_topk_prob``, although its default is off.
"""

from moejax.layers import GLU, AttentionConfig, BlockConfig, MLPConfig, MoEConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, experts
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable


def config(fields: Fields) -> Config:
    """Map the fields of ``Qwen3MoeConfig``."""
    fields.no_window()
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    eps, bias = fields("rms_norm_eps", 1e-6), fields("attention_bias", False)
    attention = AttentionConfig(
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", 4),
        head_dim=fields.head_dim(dim, heads),
        norm_eps=eps,
        qk_norm="head",
        bias=bias,
        output_bias=bias,
    )
    router = RouterConfig(
        num_experts=fields.size("num_experts", 128, alias="num_local_experts"),
        num_selected=fields.size("num_experts_per_tok", 8),
        weigh="renormalised" if fields("norm_topk_prob", False) else "raw",
    )
    glu = GLU(fields("hidden_act", "silu"))
    moe = MoEConfig(dim, fields.size("moe_intermediate_size"), router, glu)
    dense = MLPConfig(dim, fields.size("intermediate_size"), glu)
    return Config(
        model_type="qwen3_moe",
        blocks=tuple(
            BlockConfig(attention, moe if fields.has_experts(layer) else dense, eps)
            for layer in range(fields.size("num_hidden_layers"))
        ),
        rope=fields.rope(),
        norm_eps=eps,
        **fields.common(max_positions=32768),
    )


KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE, **experts()}
