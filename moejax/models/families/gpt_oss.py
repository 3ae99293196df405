"""GPT-OSS (OpenAI, arXiv 2508.10925; ``modeling_gpt_oss.py`` of transformers).

Layers alternate between a window and all tokens; every head has a learned sink; everything has biases; the experts'
gate is limited, steeper than SiLU, and multiplies the linear branch plus one; weights are softmax over the selected.
"""

from moejax.layers import GLU, AttentionConfig, BlockConfig, MixtureConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import ATTENTION, GROUPED_QUERY, MLP, OUTER, grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, interleaved, interleaved_rows, transposed, whole
from moejax.models.kinds import EPSILON, NUMBER

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_EXPERTS = MLP + "experts."
_MOE = "layers.{layer}.feed_forward."

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    "layers.{layer}.attention.sinks": [whole(ATTENTION + "sinks")],
    _MOE + "router.weight": [whole(MLP + "router.weight")],
    _MOE + "router.bias": [whole(MLP + "router.bias")],
    _MOE + "experts.gate_up": [interleaved(_EXPERTS + "gate_up_proj")],
    _MOE + "experts.gate_up_bias": [interleaved_rows(_EXPERTS + "gate_up_proj_bias")],
    _MOE + "experts.down": [transposed(_EXPERTS + "down_proj")],
    _MOE + "experts.down_bias": [whole(_EXPERTS + "down_proj_bias")],
    # as MXFP4
    **{
        _MOE + f"experts.gate_up.{part}": [interleaved_rows(f"{_EXPERTS}gate_up_proj_{part}")]
        for part in ("blocks", "scales")
    },
    **{_MOE + f"experts.down.{part}": [whole(f"{_EXPERTS}down_proj_{part}")] for part in ("blocks", "scales")},
}


@register_family("gpt_oss", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields of ``GptOssConfig``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    eps, bias = fields("rms_norm_eps", EPSILON, 1e-5), fields.flag("attention_bias", True)
    fields.packed_as("mxfp4")  # the tensors say themselves whether they are
    # as in the rotary parameters; as num_experts_per_tok
    fields.without_effect("initial_context_length", "experts_per_token")
    fields.must_be("hidden_act", "silu")
    windows = {"sliding_attention": fields.size("sliding_window", 128), "full_attention": None}
    kinds = fields.layer_types(layers, list(windows), [list(windows)[i % 2] for i in range(layers)])

    def attention(window: int | None) -> AttentionConfig:
        return grouped_query(
            fields,
            eps,
            kv_heads=8,
            head_dim=64,
            theta=150000.0,
            scaling=_YARN,
            bias=bias,
            output_bias=bias,
            window=window,
            sinks=True,
        )

    router = RouterConfig(
        num_experts=fields.size("num_local_experts", 128),
        num_selected=fields.size("num_experts_per_tok", 4),
        score="logits",
        weigh="softmax",
        bias=True,
    )
    glu = GLU("silu", fields("swiglu_alpha", NUMBER, 1.702), fields("swiglu_limit", NUMBER, 7.0), offset=1.0)
    moe = MixtureConfig(dim, fields.size("intermediate_size"), router, glu, expert_bias=True)
    blocks = {kind: BlockConfig(attention(window), moe, eps) for kind, window in windows.items()}
    return Config(
        model_type="gpt_oss",
        blocks=tuple(blocks[kind] for kind in kinds),
        norm_eps=eps,
        **fields.common(max_positions=131072),
    )
