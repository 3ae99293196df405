"""MiniMax-M2 (``modeling_minimax_m2.py`` of transformers).

Queries and keys are normalised over their full width; a part of each head may turn; sigmoid scores are renormalised,
and the selection has a bias.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import GROUPED_QUERY, LAYER, MLP, OUTER, experts, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, whole
from moejax.models.kinds import ACTIVATION, EPSILON

_BIAS = "e_score_correction_bias"

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    **experts("block_sparse_moe.", gate="w1", up="w3", down="w2"),
    "layers.{layer}.feed_forward.router.selection_bias": [
        whole(MLP + _BIAS),
        whole(f"{MLP}gate.{_BIAS}"),
        whole(f"{LAYER}block_sparse_moe.{_BIAS}"),
    ],
}


@register_family("minimax_m2", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``MiniMaxM2Config``."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    eps, head_dim = fields("rms_norm_eps", EPSILON, 1e-6), fields.head_dim(dim, heads, 128)
    fields.without_effect("router_jitter_noise")  # training only
    published = fields.size("rotary_dim", None)
    turning = published or fields.rotary_dim(head_dim)
    attention = grouped_query(fields, eps, kv_heads=8, head_dim=128, theta=5e6, qk_norm="full", rotary_dim=turning)
    router = RouterConfig(
        num_experts=fields.size("num_local_experts", 256, alias="num_experts"),
        num_selected=fields.size("num_experts_per_tok", 8),
        score="sigmoid",
        weigh="renormalised",
        selection_bias=True,
    )
    moe = MixtureConfig(dim, fields.size("intermediate_size"), router, GLU(fields("hidden_act", ACTIVATION, "silu")))
    return Config(
        model_type="minimax_m2",
        blocks=(BlockConfig(attention, moe, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=196608),
    )
