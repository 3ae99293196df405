"""Mistral (Jiang et al., arXiv 2310.06825; ``modeling_mistral.py`` of transformers): Llama with an optional window."""

from moejax.layers import GLU, BlockConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE}


@register_family("mistral", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``MistralConfig``; a window that is absent has the class's 4096 tokens, ``null`` is none."""
    eps = fields("rms_norm_eps", EPSILON, 1e-6)
    window = fields.size_or_none("sliding_window", 4096)
    attention = grouped_query(fields, eps, kv_heads=8, window=window)
    dense = MLPConfig(
        attention.model_dim, fields.size("intermediate_size"), GLU(fields("hidden_act", ACTIVATION, "silu"))
    )
    return Config(
        model_type="mistral",
        blocks=(BlockConfig(attention, dense, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=131072),
    )
