"""Llama (Touvron et al., arXiv 2302.13971; ``modeling_llama.py`` of transformers) and models of its architecture.

Every layer is dense. Biases of attention, output projection included, and of the feed-forward part are optional.
"""

from moejax.layers import GLU, BlockConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import DENSE, GROUPED_QUERY, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **DENSE}


@register_family("llama", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``LlamaConfig``."""
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-6), fields.flag("attention_bias", False)
    # how a product was cut up in training, whose value is the same; a note of those who published SmolLM2
    fields.without_effect("pretraining_tp", "is_llama_config")
    attention = grouped_query(fields, eps, bias=bias, output_bias=bias)
    dense = MLPConfig(
        attention.model_dim,
        fields.size("intermediate_size"),
        GLU(fields("hidden_act", ACTIVATION, "silu")),
        bias=fields.flag("mlp_bias", False),
    )
    return Config(
        model_type="llama",
        blocks=(BlockConfig(attention, dense, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=2048),
    )
