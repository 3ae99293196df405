"""OLMoE (Muennighoff et al., arXiv 2409.02060; ``modeling_olmoe.py`` of transformers).

Queries and keys are normalised over their full width before the head split and, like the values, optionally clipped;
routing weights are softmax over all experts, renormalised only if ``norm_topk_prob``.
"""

from moejax.errors import ConfigError
from moejax.layers import AttentionConfig, MoEConfig
from moejax.models.config import Config
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, merged_halves, per_expert, whole
from moejax.ops.activation import SLOPES


def config(fields: Fields) -> Config:
    """Map the fields of ``OlmoeConfig``."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    experts, selected = fields.size("num_experts", 64), fields.size("num_experts_per_tok", 8)
    activation = fields("hidden_act", "silu")
    if dim % heads:
        raise ConfigError(f"hidden_size={dim} is not divisible by num_attention_heads={heads}.")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}.")
    if selected > experts:
        raise ConfigError(f"num_experts_per_tok={selected} is more than num_experts={experts}.")
    if activation not in SLOPES:
        raise ConfigError(f"hidden_act={activation!r} is not supported; supported are: {', '.join(SLOPES)}.")
    eps = fields("rms_norm_eps", 1e-5)
    clip = fields("clip_qkv", None)
    attention = AttentionConfig(
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.size("head_dim", dim // heads),
        norm_eps=eps,
        qk_norm="full",
        clip=None if clip is None else float(clip),
        bias=fields("attention_bias", False),
    )
    moe = MoEConfig(
        model_dim=dim,
        expert_dim=fields.size("intermediate_size"),
        num_experts=experts,
        num_selected=selected,
        weigh="renormalised" if fields("norm_topk_prob", False) else "raw",
        activation=activation,
    )
    return Config(
        model_type="olmoe",
        vocab_size=fields.size("vocab_size"),
        model_dim=dim,
        num_layers=fields.size("num_hidden_layers"),
        attention=attention,
        moe=moe,
        rope_theta=fields.rope_theta(),
        norm_eps=eps,
        tied=fields("tie_word_embeddings", False),
        max_positions=fields.size("max_position_embeddings", 4096),
        eos_ids=fields.eos_ids(),
        pad_id=fields("pad_token_id", 0),
    )


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_EXPERT = _LAYER + "mlp.experts.{expert}."

KEYS: KeyTable = {
    "embedding": [whole("model.embed_tokens.weight")],
    "head": [whole("lm_head.weight")],
    "norm.weight": [whole("model.norm.weight")],
    "layers.{layer}.attention_norm.weight": [whole(_LAYER + "input_layernorm.weight")],
    "layers.{layer}.moe_norm.weight": [whole(_LAYER + "post_attention_layernorm.weight")],
    "layers.{layer}.attention.query.weight": [whole(_ATTENTION + "q_proj.weight")],
    "layers.{layer}.attention.query.bias": [whole(_ATTENTION + "q_proj.bias")],
    "layers.{layer}.attention.key.weight": [whole(_ATTENTION + "k_proj.weight")],
    "layers.{layer}.attention.key.bias": [whole(_ATTENTION + "k_proj.bias")],
    "layers.{layer}.attention.value.weight": [whole(_ATTENTION + "v_proj.weight")],
    "layers.{layer}.attention.value.bias": [whole(_ATTENTION + "v_proj.bias")],
    "layers.{layer}.attention.output.weight": [whole(_ATTENTION + "o_proj.weight")],
    "layers.{layer}.attention.output.bias": [whole(_ATTENTION + "o_proj.bias")],
    "layers.{layer}.attention.query_norm.weight": [whole(_ATTENTION + "q_norm.weight")],
    "layers.{layer}.attention.key_norm.weight": [whole(_ATTENTION + "k_norm.weight")],
    "layers.{layer}.moe.router.weight": [whole(_LAYER + "mlp.gate.weight")],
    "layers.{layer}.moe.gate_up": [
        merged_halves(_LAYER + "mlp.experts.gate_up_proj"),
        per_expert(_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    ],
    "layers.{layer}.moe.down": [
        whole(_LAYER + "mlp.experts.down_proj"),
        per_expert(_EXPERT + "down_proj.weight"),
    ],
}
