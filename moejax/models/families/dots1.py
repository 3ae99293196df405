"""dots.llm1 (arXiv 2506.05767; ``modeling_dots1.py`` of transformers): DeepSeek-V3's router, norms of each head."""

from moejax.layers import GLU, BlockConfig, MixtureConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import (
    DENSE,
    GROUPED_QUERY,
    OUTER,
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


@register_family("dots1", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``Dots1Config``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-6), fields.flag("attention_bias", False)
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    router = sigmoid_router(fields, renormalised=False)
    moe = MixtureConfig(
        dim, fields.size("moe_intermediate_size", 1408), router, glu, shared=ungated_shared(fields, glu, default=0)
    )
    dense, first = MLPConfig(dim, fields.size("intermediate_size"), glu), fields("first_k_dense_replace", COUNT, 0)
    blocks = tuple(
        BlockConfig(
            grouped_query(fields, eps, qk_norm="head", bias=bias, output_bias=bias, window=window),
            dense if i < first else moe,
            eps,
        )
        for i, window in enumerate(fields.windows(layers, 4096, switched=False))
    )
    return Config(model_type="dots1", blocks=blocks, norm_eps=eps, **fields.common(max_positions=2048))
