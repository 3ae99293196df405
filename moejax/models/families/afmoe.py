"""AFMoE, Arcee's Trinity models (``modeling_afmoe.py`` of transformers).

Norms before and behind each part; heads are multiplied by a sigmoid gate; layers with a window rotate queries and keys,
the others have no positions; sigmoid routing with a bias in the selection.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig, RouterConfig, WideRMSNorm
from moejax.models.config import Config
from moejax.models.families._shared import (
    ATTENTION,
    DENSE,
    GROUPED_QUERY,
    LAYER,
    MLP,
    OUTER,
    experts,
    grouped_query,
    shared_experts,
    ungated_shared,
)
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, whole
from moejax.models.kinds import ACTIVATION, COUNT, EPSILON, NUMBER

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_mlp_layernorm",
    "feed_forward_post_norm": "post_mlp_layernorm",
}

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    "layers.{layer}.attention.gate.weight": [whole(ATTENTION + "gate_proj.weight")],
    **DENSE,
    **experts(),
    "layers.{layer}.feed_forward.router.weight": [whole(MLP + "router.gate.weight")],
    "layers.{layer}.feed_forward.router.selection_bias": [whole(MLP + "expert_bias")],
    **shared_experts(),
    **{f"layers.{{layer}}.{ours}.weight": [whole(f"{LAYER}{theirs}.weight")] for ours, theirs in _NORMS.items()},
}


@register_family("afmoe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``AfmoeConfig``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-5), fields.flag("attention_bias", False)
    every, window = fields.size("global_attn_every_n_layers", 4), fields.size("sliding_window", 1024)
    usual = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    kinds = fields.layer_types(layers, ("full_attention", "sliding_attention"), usual)
    for name, only in (("score_func", "sigmoid"), ("route_norm", True), ("n_group", 1), ("topk_group", 1)):
        fields.must_be(name, only)
    router = RouterConfig(
        num_experts=fields.size("num_experts", 64),
        num_selected=fields.size("num_experts_per_tok", 6),
        score="sigmoid",
        weigh="renormalised",
        scale=fields("route_scale", NUMBER, 1.0),
        selection_bias=True,
    )
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    shared = ungated_shared(fields, glu, count="num_shared_experts", default=2)
    moe = MixtureConfig(dim, fields.size("moe_intermediate_size", 1408), router, glu, shared=shared)
    dense, first = MLPConfig(dim, fields.size("intermediate_size"), glu), fields("num_dense_layers", COUNT, 1)

    rope = fields.rope()

    def block(i: int, kind: str) -> BlockConfig:
        is_windowed = kind == "sliding_attention"
        attention = grouped_query(
            fields,
            eps,
            head_dim=128,
            qk_norm="head",
            norm=WideRMSNorm,
            gated=True,
            bias=bias,
            output_bias=bias,
            window=window if is_windowed else None,
            rope=rope if is_windowed else None,
        )
        return BlockConfig(attention, dense if i < first else moe, eps, tuple(_NORMS), WideRMSNorm)

    return Config(
        model_type="afmoe",
        blocks=tuple(block(i, kind) for i, kind in enumerate(kinds)),
        norm_eps=eps,
        norm=WideRMSNorm,
        embedding_factor=dim**0.5 if fields.flag("mup_enabled", False) else 1.0,
        **fields.common(max_positions=16384),
    )
