"""OLMoE (Muennighoff et al., arXiv 2409.02060; ``modeling_olmoe.py`` of transformers).

Queries and keys are normalised over their full width before the head split and, like the values, optionally clipped;
routing weights are softmax over all experts, renormalised only if ``norm_topk_prob``.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig
from moejax.models.config import Config
from moejax.models.families._shared import GROUPED_QUERY, OUTER, experts, grouped_query, softmax_router
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON, NUMBER

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **experts()}


@register_family("olmoe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``OlmoeConfig``."""
    dim = fields.size("hidden_size")
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-5), fields.flag("attention_bias", False)
    clip = fields("clip_qkv", NUMBER, None)
    attention = grouped_query(fields, eps, qk_norm="full", clip=clip, bias=bias, output_bias=bias)
    router = softmax_router(fields, experts=64, selected=8)
    moe = MixtureConfig(dim, fields.size("intermediate_size"), router, GLU(fields("hidden_act", ACTIVATION, "silu")))
    return Config(
        model_type="olmoe",
        blocks=(BlockConfig(attention, moe, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=4096),
    )
