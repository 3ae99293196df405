"""FlexOlmo (Shi et al., arXiv 2507.07024; ``modeling_flex_olmo.py`` of transformers).

OLMoE with norms behind each part in place of before it.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig
from moejax.models.config import Config
from moejax.models.families._shared import GROUPED_QUERY, LAYER, OUTER, experts, grouped_query, softmax_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, whole
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    **experts(),
    "layers.{layer}.attention_post_norm.weight": [whole(LAYER + "post_attention_layernorm.weight")],
    "layers.{layer}.feed_forward_post_norm.weight": [whole(LAYER + "post_feedforward_layernorm.weight")],
}


@register_family("flex_olmo", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``FlexOlmoConfig``."""
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-6), fields.flag("attention_bias", False)
    attention = grouped_query(fields, eps, theta=5e5, qk_norm="full", bias=bias, output_bias=bias)
    router = softmax_router(fields, experts=7, selected=5)
    moe = MixtureConfig(
        attention.model_dim, fields.size("intermediate_size"), router, GLU(fields("hidden_act", ACTIVATION, "silu"))
    )
    norms = ("attention_post_norm", "feed_forward_post_norm")
    return Config(
        model_type="flex_olmo",
        blocks=(BlockConfig(attention, moe, eps, norms),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=4096),
    )
