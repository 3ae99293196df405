"""GLM-4.7-Flash (Zhipu; ``modeling_glm4_moe_lite.py`` of transformers): DeepSeek-V3's architecture in one group."""

from moejax.models.config import Config
from moejax.models.families._latent import KEYS, deepseek, latent_attention
from moejax.models.families._shared import PREDICTION_LAYER, SELECTION_BIAS, sigmoid_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.kinds import EPSILON, list_of, one_of


@register_family("glm4_moe_lite", {**KEYS, **SELECTION_BIAS}, left_out=PREDICTION_LAYER)
def config(fields: Fields) -> Config:
    """Map the fields of ``Glm4MoeLiteConfig``."""
    fields.without_effect("num_nextn_predict_layers")  # those layers are left out
    for name, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        fields.must_be(name, only)
    layers = fields.size("num_hidden_layers")
    usual = ("dense", *("sparse",) * (layers - 1))
    kinds = fields("mlp_layer_types", list_of(one_of(("dense", "sparse")), layers), usual)
    return deepseek(
        fields,
        "glm4_moe_lite",
        sigmoid_router(fields, experts=64, selected=4, scale=1.8),
        latent_attention(fields, query_dim=768, plain_dim=192, value_dim=256),
        [kind == "dense" for kind in kinds],
        eps=fields("rms_norm_eps", EPSILON, 1e-5),
        expert_dim=1536,
        shared=1,
        max_positions=202752,
    )
