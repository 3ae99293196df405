"""ERNIE 4.5 MoE (Baidu; ``modeling_ernie4_5_moe.py`` of transformers).

Neighbouring dimensions rotate in pairs; the selection has a bias; shared experts stand beside the routed ones.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import (
    DENSE,
    GROUPED_QUERY,
    MLP,
    OUTER,
    experts,
    grouped_query,
    shared_experts,
    ungated_shared,
)
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, with_unit_axis
from moejax.models.kinds import ACTIVATION, COUNT, EPSILON, integer

_BIAS = "moe_statics.e_score_correction_bias"

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    **DENSE,
    **experts(),
    **shared_experts(),
    "layers.{layer}.feed_forward.router.selection_bias": [
        with_unit_axis(f"{MLP}gate.{_BIAS}"),
        with_unit_axis(MLP + _BIAS),
    ],
}
LEFT_OUT = ("model.mtp_*",)
"""Tensors of layers that predict tokens further ahead, which only training uses."""


@register_family("ernie4_5_moe", KEYS, left_out=LEFT_OUT)
def config(fields: Fields) -> Config:
    """Map the fields of ``Ernie4_5_MoeConfig``."""
    fields.must_be("use_bias", False)
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    eps = fields("rms_norm_eps", EPSILON, 1e-5)
    fields.without_effect("moe_norm_min")  # a guard of a division by the sum of the selected scores
    attention = grouped_query(fields, eps, kv_heads=4, theta=5e5, rotates_neighbours=True)
    router = RouterConfig(
        num_experts=fields.size("moe_num_experts", 64, alias="num_experts"),
        num_selected=fields.size("moe_k", 6, alias="num_experts_per_tok"),
        weigh="renormalised",
        selection_bias=True,
    )
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    shared = ungated_shared(fields, glu, count="moe_num_shared_experts", default=2)
    moe = MixtureConfig(dim, fields.size("moe_intermediate_size", 1536), router, glu, shared=shared)
    dense = MLPConfig(dim, fields.size("intermediate_size"), glu)
    first, last = fields("moe_layer_start_index", COUNT, 1), fields("moe_layer_end_index", integer(-1, 2**24), -1)
    last, step = layers - 1 if last == -1 else last, fields.size("moe_layer_interval", 1)
    return Config(
        model_type="ernie4_5_moe",
        blocks=tuple(
            BlockConfig(attention, moe if first <= i <= last and (i + 1) % step == 0 else dense, eps)
            for i in range(layers)
        ),
        norm_eps=eps,
        **fields.common(max_positions=131072, tied=True),
    )
