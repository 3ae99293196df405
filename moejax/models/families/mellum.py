"""Mellum 2 (``modeling_mellum.py`` of transformers): Qwen3-MoE whose windows and positions depend on the layer."""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, experts, grouped_query, softmax_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON, list_of, one_of

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE, **experts()}


@register_family("mellum", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``MellumConfig``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-6), fields.flag("attention_bias", False)
    window = fields.size("sliding_window", 1024)
    kinds = fields.layer_types(layers, ("full_attention", "sliding_attention"), ["full_attention"] * layers)
    parts = fields("mlp_layer_types", list_of(one_of(("dense", "sparse")), layers), ("sparse",) * layers)
    # layers that predict further tokens are left out
    fields.without_effect("num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types")
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    router = softmax_router(fields, experts=64, selected=8, renormalised=True)
    moe = MixtureConfig(dim, fields.size("moe_intermediate_size", 896), router, glu)
    dense = MLPConfig(dim, fields.size("intermediate_size"), glu)

    def block(kind: str, part: str) -> BlockConfig:
        is_windowed = kind == "sliding_attention"
        attention = grouped_query(
            fields,
            eps,
            kv_heads=4,
            head_dim=128,
            theta=1e4 if is_windowed else 5e5,
            kind=kind,
            qk_norm="head",
            bias=bias,
            output_bias=bias,
            window=window if is_windowed else None,
        )
        return BlockConfig(attention, moe if part == "sparse" else dense, eps)

    return Config(
        model_type="mellum",
        blocks=tuple(map(block, kinds, parts)),
        norm_eps=eps,
        **fields.common(max_positions=131072),
    )
