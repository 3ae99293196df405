"""Mixtral (Jiang et al., arXiv 2401.04088; ``modeling_mixtral.py`` of transformers).

Plain grouped-query attention, optionally with a window in every layer; the selected experts' weights are renormalised.
"""

from typing import Any

from moejax.layers import GLU, BlockConfig, MixtureConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import GROUPED_QUERY, OUTER, experts, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **experts("block_sparse_moe.", gate="w1", up="w3", down="w2")}


def write_config(config: Config) -> dict[str, Any]:
    """The fields of a Mixtral with this architecture; raises ``AttributeError`` where a part lacks what it needs."""
    moe: Any = config.blocks[0].feed_forward
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": moe.unit.activation,
        "intermediate_size": moe.expert_dim,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.num_selected,
        "sliding_window": None,
    }


@register_family("mixtral", KEYS, write_config=write_config)
def config(fields: Fields) -> Config:
    """Map the fields of ``MixtralConfig``."""
    dim = fields.size("hidden_size")
    eps = fields("rms_norm_eps", EPSILON, 1e-5)
    fields.without_effect("router_jitter_noise")  # training only
    attention = grouped_query(fields, eps, kv_heads=8, theta=1e6, window=fields.size("sliding_window", None))
    router = RouterConfig(
        num_experts=fields.size("num_local_experts", 8),
        num_selected=fields.size("num_experts_per_tok", 2),
        weigh="renormalised",
    )
    moe = MixtureConfig(dim, fields.size("intermediate_size"), router, GLU(fields("hidden_act", ACTIVATION, "silu")))
    return Config(
        model_type="mixtral",
        blocks=(BlockConfig(attention, moe, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=131072),
    )
