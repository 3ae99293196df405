"""GLM-4.5 and 4.6 (Zhipu, arXiv 2508.06471; ``modeling_glm4_moe.py`` of transformers).

DeepSeek-V3's router over plain attention, of which half of each head turns; the first layers are dense.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import (
    DENSE,
    GROUPED_QUERY,
    OUTER,
    PREDICTION_LAYER,
    SELECTION_BIAS,
    experts,
    grouped_query,
    shared_experts,
    sigmoid_router,
    ungated_shared,
)
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, COUNT, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE, **experts(), **shared_experts(), **SELECTION_BIAS}


@register_family("glm4_moe", KEYS, left_out=PREDICTION_LAYER)
def config(fields: Fields) -> Config:
    """Map the fields of ``Glm4MoeConfig``."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    eps, layers = fields("rms_norm_eps", EPSILON, 1e-5), fields.size("num_hidden_layers")
    fields.without_effect("num_nextn_predict_layers")  # those layers are left out
    turning = fields.rotary_dim(fields.head_dim(dim, heads), 0.5)
    attention = grouped_query(
        fields,
        eps,
        kv_heads=8,
        rotary_dim=turning,
        bias=fields.flag("attention_bias", False),
        qk_norm="head" if fields.flag("use_qk_norm", False) else None,
    )
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    router = sigmoid_router(fields, experts=128, selected=8)
    moe = MixtureConfig(
        dim, fields.size("moe_intermediate_size", 1408), router, glu, shared=ungated_shared(fields, glu)
    )
    dense, first = MLPConfig(dim, fields.size("intermediate_size"), glu), fields("first_k_dense_replace", COUNT, 1)
    return Config(
        model_type="glm4_moe",
        blocks=tuple(BlockConfig(attention, dense if i < first else moe, eps) for i in range(layers)),
        norm_eps=eps,
        **fields.common(max_positions=131072),
    )
