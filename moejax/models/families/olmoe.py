"""OLMoE (Muennighoff et al., arXiv 2409.02060; ``modeling_olmoe.py`` of transformers).

Queries and keys are normalised over their full width before the head split and, like the values, optionally clipped;
routing weights are softmax over all experts, renormalised only if ``norm_topk_prob``.
"""

from moejax.layers import GLU, AttentionConfig, BlockConfig, MoEConfig, RouterConfig
from moejax.models.config import Config
from moejax.models.families._shared import GROUPED_QUERY, OUTER, experts
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable


def config(fields: Fields) -> Config:
    """Map the fields of ``OlmoeConfig``."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    eps, bias = fields("rms_norm_eps", 1e-5), fields("attention_bias", False)
    clip = fields("clip_qkv", None)
    attention = AttentionConfig(
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.head_dim(dim, heads),
        norm_eps=eps,
        qk_norm="full",
        clip=None if clip is None else float(clip),
        bias=bias,
        output_bias=bias,
    )
    router = RouterConfig(
        num_experts=fields.size("num_experts", 64, alias="num_local_experts"),
        num_selected=fields.size("num_experts_per_tok", 8),
        weigh="renormalised" if fields("norm_topk_prob", False) else "raw",
    )
    moe = MoEConfig(dim, fields.size("intermediate_size"), router, GLU(fields("hidden_act", "silu")))
    return Config(
        model_type="olmoe",
        blocks=(BlockConfig(attention, moe, eps),) * fields.size("num_hidden_layers"),
        rope=fields.rope(),
        norm_eps=eps,
        **fields.common(max_positions=4096),
    )


KEYS: KeyTable = {**OUTER, **GROUPED_QUERY, **experts()}
