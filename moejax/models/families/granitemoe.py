"""Granite 3 MoE (IBM; ``modeling_granitemoe.py`` and ``modeling_granitemoeshared.py`` of transformers).

The smallest mixtures that are published. Four factors scale embeddings, attention scores, what each part writes, and
logits; experts are fused; a layer may have a dense layer beside its experts (``granitemoeshared``).
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, RouterConfig, SharedConfig
from moejax.models.config import Config
from moejax.models.families._shared import GROUPED_QUERY, LAYER, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, merged_halves, whole
from moejax.models.kinds import ACTIVATION, COUNT, EPSILON, NUMBER

_MOE, _SHARED = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."
_OURS = "layers.{layer}.feed_forward."

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    # the first layout is that of transformers 5 in memory, the second what is published
    _OURS + "router.weight": [whole(_MOE + "router.weight"), whole(_MOE + "router.layer.weight")],
    _OURS + "experts.gate_up": [
        merged_halves(_MOE + "experts.gate_up_proj"),
        merged_halves(_MOE + "input_linear.weight"),
    ],
    _OURS + "experts.down": [whole(_MOE + "experts.down_proj"), whole(_MOE + "output_linear.weight")],
    _OURS + "shared.mlp.gate_up": [merged_halves(_SHARED + "input_linear.weight")],
    _OURS + "shared.mlp.down": [whole(_SHARED + "output_linear.weight")],
}


def granite(fields: Fields, model_type: str, shared_dim: int) -> Config:
    """The architecture of both model types; ``shared_dim`` is the width of the dense layer, zero for none."""
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-6), fields.flag("attention_bias", False)
    attention = grouped_query(
        fields, eps, bias=bias, output_bias=bias, scale=fields("attention_multiplier", NUMBER, 1.0)
    )
    router = RouterConfig(
        num_experts=fields.size("num_local_experts", 8),
        num_selected=fields.size("num_experts_per_tok", 2),
        score="logits",
        weigh="softmax",
    )
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    shared = SharedConfig(shared_dim, glu) if shared_dim else None
    moe = MixtureConfig(attention.model_dim, fields.size("intermediate_size"), router, glu, shared=shared)
    block = BlockConfig(attention, moe, eps, branch_factor=fields("residual_multiplier", NUMBER, 1.0))
    return Config(
        model_type=model_type,
        blocks=(block,) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        embedding_factor=fields("embedding_multiplier", NUMBER, 1.0),
        logits_factor=1 / fields("logits_scaling", NUMBER, 1.0),
        **fields.common(max_positions=2048),
    )


@register_family("granitemoe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``GraniteMoeConfig``."""
    return granite(fields, "granitemoe", 0)


@register_family("granitemoeshared", KEYS)
def shared_config(fields: Fields) -> Config:
    """Map the fields of ``GraniteMoeSharedConfig``."""
    return granite(fields, "granitemoeshared", fields("shared_intermediate_size", COUNT, 0))
