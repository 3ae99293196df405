"""Qwen3 (Yang et al., arXiv 2505.09388; ``modeling_qwen3.py`` of transformers): dense, with norms of each head."""

from moejax.layers import GLU, BlockConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE}


@register_family("qwen3", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``Qwen3Config``."""
    eps, layers = fields("rms_norm_eps", EPSILON, 1e-6), fields.size("num_hidden_layers")
    bias = fields.flag("attention_bias", False)
    parts = {"kv_heads": 32, "head_dim": 128, "qk_norm": "head", "bias": bias, "output_bias": bias}
    dense = MLPConfig(
        fields.size("hidden_size"), fields.size("intermediate_size"), GLU(fields("hidden_act", ACTIVATION, "silu"))
    )
    blocks = tuple(
        BlockConfig(grouped_query(fields, eps, **parts, window=window), dense, eps) for window in fields.windows(layers)
    )
    return Config(model_type="qwen3", blocks=blocks, norm_eps=eps, **fields.common(max_positions=32768))
