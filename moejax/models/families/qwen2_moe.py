"""Qwen2-MoE and Qwen1.5-MoE (Yang et al., arXiv 2407.10671; ``modeling_qwen2_moe.py`` of transformers).

Queries, keys and values have biases; a shared expert with a sigmoid gate stands beside the routed ones.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig, SharedConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, MLP, OUTER, experts, grouped_query, softmax_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, stacked, whole
from moejax.models.kinds import ACTIVATION, EPSILON

_SHARED = "layers.{layer}.feed_forward.shared."

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    **DENSE,
    **experts(),
    _SHARED + "mlp.gate_up": [stacked(MLP + "shared_expert.gate_proj.weight", MLP + "shared_expert.up_proj.weight")],
    _SHARED + "mlp.down": [whole(MLP + "shared_expert.down_proj.weight")],
    _SHARED + "router.weight": [whole(MLP + "shared_expert_gate.weight")],
}


@register_family("qwen2_moe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``Qwen2MoeConfig``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    fields.no_window(layers)
    eps = fields("rms_norm_eps", EPSILON, 1e-6)
    attention = grouped_query(fields, eps, bias=fields.flag("qkv_bias", True))
    router = softmax_router(fields, experts=60, selected=4)
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    shared = fields.size("shared_expert_intermediate_size", 5632)
    moe = MixtureConfig(
        dim, fields.size("moe_intermediate_size"), router, glu, shared=SharedConfig(shared, glu, routed=True)
    )
    dense = MLPConfig(dim, fields.size("intermediate_size"), glu)
    return Config(
        model_type="qwen2_moe",
        blocks=tuple(BlockConfig(attention, moe if is_moe else dense, eps) for is_moe in fields.are_mixtures(layers)),
        norm_eps=eps,
        **fields.common(max_positions=32768),
    )
