"""DeepSeek-V2 (arXiv 2405.04434; ``modeling_deepseek_v2.py`` of transformers).

Latent attention; softmax scores that are scaled, never renormalised; in the larger model a token's experts come from
its best groups.
"""

from moejax.layers import RouterConfig
from moejax.models.config import Config
from moejax.models.families._latent import KEYS, deepseek, latent_attention
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.kinds import COUNT, EPSILON, NUMBER, one_of

_METHODS = ("greedy", "group_limited_greedy")


@register_family("deepseek_v2", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``DeepseekV2Config``."""
    fields.must_be("mlp_bias", False)
    fields.must_be("moe_layer_freq", 1)
    fields.must_be("scoring_func", "softmax")
    fields.must_be("norm_topk_prob", False)  # transformers never renormalises, whatever it says
    method = fields("topk_method", one_of(_METHODS), "greedy")
    groups, best = (fields.size(name, 1) for name in ("n_group", "topk_group"))
    limits = {"num_groups": groups, "num_selected_groups": best} if method == "group_limited_greedy" else {}
    router = RouterConfig(
        num_experts=fields.size("n_routed_experts", 64, alias="num_experts"),
        num_selected=fields.size("num_experts_per_tok"),
        weigh="raw",
        scale=fields("routed_scaling_factor", NUMBER, 1.0),
        group_score="max",
        **limits,
    )
    layers, first = fields.size("num_hidden_layers"), fields("first_k_dense_replace", COUNT, 0)
    return deepseek(
        fields,
        "deepseek_v2",
        router,
        latent_attention(fields, query_dim=1536),
        [i < first for i in range(layers)],
        eps=fields("rms_norm_eps", EPSILON, 1e-6),
        expert_dim=1407,
        shared=2,
        max_positions=2048,
    )
