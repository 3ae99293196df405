"""DeepSeek-V3 (arXiv 2412.19437; ``modeling_deepseek_v3.py`` of transformers), Moonlight and Kimi-K2 by their shape.

Latent attention; sigmoid scores with a bias in the selection, groups ranked by their two best experts, weights that are
renormalised and scaled.
"""

from moejax.models.config import Config
from moejax.models.families._latent import KEYS, deepseek, latent_attention
from moejax.models.families._shared import PREDICTION_LAYER, SELECTION_BIAS, sigmoid_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.kinds import COUNT, EPSILON


@register_family("deepseek_v3", {**KEYS, **SELECTION_BIAS}, left_out=PREDICTION_LAYER)
def config(fields: Fields) -> Config:
    """Map the fields of ``DeepseekV3Config``."""
    fields.without_effect("num_nextn_predict_layers")  # those layers are left out
    for name, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        fields.must_be(name, only)
    layers, first = fields.size("num_hidden_layers"), fields("first_k_dense_replace", COUNT, 3)
    return deepseek(
        fields,
        "deepseek_v3",
        sigmoid_router(fields, experts=256, selected=8, groups=(8, 4), scale=2.5),
        latent_attention(fields, query_dim=1536),
        [i < first for i in range(layers)],
        eps=fields("rms_norm_eps", EPSILON, 1e-6),
        expert_dim=2048,
        shared=1,
        max_positions=4096,
    )
