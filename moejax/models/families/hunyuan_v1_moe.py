"""Hunyuan-A13B (Tencent; ``modeling_hunyuan_v1_moe.py`` of transformers).

Queries and keys are normalised head by head after their rotation; a dense layer of the experts' width stands beside
them. A fixed ``alpha`` stretches the rotary base.
"""

from dataclasses import replace

from moejax.layers import GLU, BlockConfig, MixtureConfig, RouterConfig, SharedConfig
from moejax.models.config import Config
from moejax.models.families._shared import (
    ATTENTION,
    GROUPED_QUERY,
    MLP,
    OUTER,
    experts,
    grouped_query,
    shared_experts,
)
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, whole
from moejax.models.kinds import ACTIVATION, EPSILON
from moejax.ops.rope import Rope

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    "layers.{layer}.attention.query_norm.weight": [whole(ATTENTION + "query_layernorm.weight")],
    "layers.{layer}.attention.key_norm.weight": [whole(ATTENTION + "key_layernorm.weight")],
    **experts(),
    "layers.{layer}.feed_forward.router.weight": [whole(MLP + "gate.wg.weight")],
    **shared_experts("shared_mlp"),
}


@register_family("hunyuan_v1_moe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``HunYuanMoEV1Config``."""
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-5), fields.flag("attention_bias", False)
    fields.without_effect("eod_token_id", "sep_token_id", "pretraining_tp")
    differences = {"bias": bias, "output_bias": bias, "qk_norm": "head", "norms_rotated": True}
    if (alpha := fields.rope_number("alpha")) is None:
        attention = grouped_query(fields, eps, **differences)
    else:
        attention = grouped_query(fields, eps, rope=None, **differences)
        width, theta = attention.head_dim, fields.rope_number("rope_theta") or 10000.0
        attention = replace(attention, rope=Rope(theta * alpha ** (width / (width - 2))))
    width, glu = fields.size("intermediate_size"), GLU(fields("hidden_act", ACTIVATION, "silu"))
    router = RouterConfig(
        num_experts=fields.size("num_experts", 1, alias="num_local_experts"),
        num_selected=fields.size("moe_topk", 1, alias="num_experts_per_tok"),
        weigh="renormalised",
    )
    moe = MixtureConfig(attention.model_dim, width, router, glu, shared=SharedConfig(width, glu))
    return Config(
        model_type="hunyuan_v1_moe",
        blocks=(BlockConfig(attention, moe, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=2048),
    )
