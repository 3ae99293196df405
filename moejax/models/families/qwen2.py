"""Qwen2 and Qwen2.5 (Yang et al., arXiv 2407.10671; ``modeling_qwen2.py`` of transformers): dense, with biases."""

from moejax.layers import GLU, BlockConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE}


@register_family("qwen2", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``Qwen2Config``."""
    eps, layers = fields("rms_norm_eps", EPSILON, 1e-6), fields.size("num_hidden_layers")
    dim = fields.size("hidden_size")
    dense = MLPConfig(dim, fields.size("intermediate_size"), GLU(fields("hidden_act", ACTIVATION, "silu")))
    blocks = tuple(
        BlockConfig(grouped_query(fields, eps, kv_heads=32, bias=True, window=window), dense, eps)
        for window in fields.windows(layers)
    )
    return Config(model_type="qwen2", blocks=blocks, norm_eps=eps, **fields.common(max_positions=32768))
