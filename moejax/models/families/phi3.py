"""Phi-3 and Phi-4 (Abdin et al., arXiv 2404.14219; ``modeling_phi3.py`` of transformers).

Queries, keys and values are published as one matrix, and so are the two branches of the feed-forward unit. A part of a
head may turn.
"""

from moejax.layers import GLU, BlockConfig, MLPConfig
from moejax.models.config import Config
from moejax.models.families._shared import ATTENTION, MLP, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, merged_grouped_heads, merged_halves, whole
from moejax.models.kinds import ACTIVATION, EPSILON

KEYS: KeyTable = {
    **OUTER,
    "layers.{layer}.attention.query_key_value.weight": [merged_grouped_heads(ATTENTION + "qkv_proj.weight")],
    "layers.{layer}.attention.output.weight": [whole(ATTENTION + "o_proj.weight")],
    "layers.{layer}.feed_forward.gate_up": [merged_halves(MLP + "gate_up_proj.weight")],
    "layers.{layer}.feed_forward.down": [whole(MLP + "down_proj.weight")],
}


@register_family("phi3", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``Phi3Config``."""
    eps = fields("rms_norm_eps", EPSILON, 1e-5)
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    fields.without_effect("resid_pdrop", "embd_pdrop")  # training only
    turning = fields.rotary_dim(fields.head_dim(dim, heads))
    attention = grouped_query(fields, eps, rotary_dim=turning, window=fields.size("sliding_window", None))
    dense = MLPConfig(dim, fields.size("intermediate_size"), GLU(fields("hidden_act", ACTIVATION, "silu")))
    return Config(
        model_type="phi3",
        blocks=(BlockConfig(attention, dense, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=4096),
    )
