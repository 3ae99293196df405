"""JetMoE (Shen et al., arXiv 2404.07413; ``modeling_jetmoe.py`` of transformers).

Attention is a mixture too: an expert is a pair of query and output projections, keys and values are shared. The norms
of the blocks have an epsilon of 1e-6 whatever the config says, which applies to the final norm alone.
"""

from moejax.layers import GLU, BlockConfig, MixtureAttentionConfig, MixtureConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import LAYER, MLP, OUTER
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, merged_halves, whole
from moejax.models.kinds import ACTIVATION, EPSILON

_BLOCK_EPS = 1e-6

_ATTENTION = LAYER + "self_attention."

KEYS: KeyTable = {
    **OUTER,
    "layers.{layer}.attention.router.weight": [whole(_ATTENTION + "experts.router.layer.weight")],
    "layers.{layer}.attention.query": [whole(_ATTENTION + "experts.input_linear.weight")],
    "layers.{layer}.attention.output": [whole(_ATTENTION + "experts.output_linear.weight")],
    "layers.{layer}.attention.key_value.weight": [whole(_ATTENTION + "kv_proj.weight")],
    "layers.{layer}.attention.bias": [whole(_ATTENTION + "experts.bias")],
    "layers.{layer}.feed_forward.router.weight": [whole(MLP + "router.layer.weight")],
    "layers.{layer}.feed_forward.experts.gate_up": [merged_halves(MLP + "input_linear.weight")],
    "layers.{layer}.feed_forward.experts.down": [whole(MLP + "output_linear.weight")],
    "layers.{layer}.feed_forward.bias": [whole(MLP + "bias")],
}


@register_family("jetmoe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``JetMoeConfig``."""
    dim = fields.size("hidden_size")
    router = RouterConfig(
        num_experts=fields.size("num_local_experts", 8),
        num_selected=fields.size("num_experts_per_tok", 2),
        score="logits",
        weigh="softmax",
    )
    kv_heads, head_dim = fields.size("num_key_value_heads"), fields.size("kv_channels", 128)
    attention = MixtureAttentionConfig(dim, kv_heads, head_dim, router, rope=fields.rope())
    fields.must_be("num_attention_heads", attention.num_heads)
    fields.must_be("head_dim", attention.head_dim)
    fields.without_effect("aux_loss_coef")  # training only
    glu = GLU(fields("activation_function", ACTIVATION, "silu"))
    moe = MixtureConfig(dim, fields.size("intermediate_size"), router, glu, output_bias=True)
    return Config(
        model_type="jetmoe",
        blocks=(BlockConfig(attention, moe, _BLOCK_EPS),) * fields.size("num_hidden_layers"),
        norm_eps=fields("rms_norm_eps", EPSILON, 1e-6),
        **fields.common(max_positions=4096, tied=True),
    )
