"""What several families publish alike."""

from collections.abc import Mapping
from typing import Any

from moejax.layers import GLU, AttentionConfig, RouterConfig, SharedConfig
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, grouped_heads, merged_halves, per_expert, stacked, whole
from moejax.models.kinds import COUNT, NUMBER

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."

OUTER: KeyTable = {
    "embedding": [whole("model.embed_tokens.weight")],
    "head": [whole("lm_head.weight")],
    "norm.weight": [whole("model.norm.weight")],
    "layers.{layer}.attention_norm.weight": [whole(LAYER + "input_layernorm.weight")],
    "layers.{layer}.feed_forward_norm.weight": [whole(LAYER + "post_attention_layernorm.weight")],
}
"""Embedding, head and norms."""

GROUPED_QUERY: KeyTable = {
    f"layers.{{layer}}.attention.{name}.{part}": [source]
    for part in ("weight", "bias")
    for name, source in (
        ("query_key_value", grouped_heads(*(f"{ATTENTION}{key}_proj.{part}" for key in "qkv"))),
        ("output", whole(f"{ATTENTION}o_proj.{part}")),
    )
} | {
    "layers.{layer}.attention.query_norm.weight": [whole(ATTENTION + "q_norm.weight")],
    "layers.{layer}.attention.key_norm.weight": [whole(ATTENTION + "k_norm.weight")],
}
"""Attention with four projections and norms of queries and keys."""

DENSE: KeyTable = {
    "layers.{layer}.feed_forward.gate_up": [stacked(MLP + "gate_proj.weight", MLP + "up_proj.weight")],
    "layers.{layer}.feed_forward.down": [whole(MLP + "down_proj.weight")],
    "layers.{layer}.feed_forward.gate_up_bias": [stacked(MLP + "gate_proj.bias", MLP + "up_proj.bias")],
    "layers.{layer}.feed_forward.down_bias": [whole(MLP + "down_proj.bias")],
}
"""Layers without experts."""


def grouped_query(
    fields: Fields,
    eps: float,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    kind: str | None = None,
    **differences: Any,
) -> AttentionConfig:
    """Attention with the sizes under their usual names; by default as many key heads as query heads.

    Args:
        kv_heads: default of ``num_key_value_heads``.
        head_dim: default of ``head_dim``; by default the width over the heads.
        theta: default base of the rotary frequencies.
        scaling: default of ``rope_parameters``.
        kind: the kind of layer, where ``rope_parameters`` has an object for each kind.
        differences: other fields of :class:`AttentionConfig`.
    """
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return AttentionConfig(
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", kv_heads or heads),
        head_dim=fields.head_dim(dim, heads, head_dim),
        norm_eps=eps,
        **({} if "rope" in differences else {"rope": fields.rope(theta, scaling, kind=kind)}),
        **differences,
    )


def softmax_router(fields: Fields, *, experts: int, selected: int, renormalised: bool = False) -> RouterConfig:
    """Softmax over all experts, renormalised over the selected if ``norm_topk_prob``; the arguments are defaults."""
    return RouterConfig(
        num_experts=fields.size("num_experts", experts, alias="num_local_experts"),
        num_selected=fields.size("num_experts_per_tok", selected),
        weigh="renormalised" if fields.flag("norm_topk_prob", renormalised) else "raw",
    )


def experts(block: str = "mlp.", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> KeyTable:
    """A mixture whose experts are published one by one, or fused as transformers 5 holds them."""
    one, fused = LAYER + block + "experts.{expert}.", LAYER + "mlp.experts."
    return {
        "layers.{layer}.feed_forward.router.weight": [
            whole(LAYER + "mlp.gate.weight"),
            whole(LAYER + block + "gate.weight"),
        ],
        "layers.{layer}.feed_forward.experts.gate_up": [
            merged_halves(fused + "gate_up_proj"),
            per_expert(f"{one}{gate}.weight", f"{one}{up}.weight"),
        ],
        "layers.{layer}.feed_forward.experts.down": [whole(fused + "down_proj"), per_expert(f"{one}{down}.weight")],
    }


def shared_experts(name: str = "shared_experts") -> KeyTable:
    """Shared experts without a router, published as one dense layer ``mlp.NAME``."""
    block = f"{MLP}{name}."
    return {
        "layers.{layer}.feed_forward.shared.mlp.gate_up": [
            stacked(block + "gate_proj.weight", block + "up_proj.weight")
        ],
        "layers.{layer}.feed_forward.shared.mlp.down": [whole(block + "down_proj.weight")],
    }


PREDICTION_LAYER = ("model.layers.{num_layers}.*",)
"""Tensors of the layer that predicts the token after the next, which only training and drafting use."""

SELECTION_BIAS: KeyTable = {
    "layers.{layer}.feed_forward.router.selection_bias": [whole(MLP + "gate.e_score_correction_bias")]
}
"""The bias of the selection under DeepSeek-V3's name."""


def sigmoid_router(
    fields: Fields,
    *,
    experts: int = 0,
    selected: int = 0,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
    renormalised: bool = True,
) -> RouterConfig:
    """DeepSeek-V3's router: sigmoid scores, a bias in the selection, groups, a factor on the weights.

    The arguments are defaults: of the counts, of the groups and how many of them are selected, of the factor, and of
    ``norm_topk_prob``. A count without a default must be in the config.
    """
    count: dict[str, Any] = {"default": experts} if experts else {}
    slots: dict[str, Any] = {"default": selected} if selected else {}
    return RouterConfig(
        num_experts=fields.size("n_routed_experts", alias="num_experts", **count),
        num_selected=fields.size("num_experts_per_tok", **slots),
        score="sigmoid",
        weigh="renormalised" if fields.flag("norm_topk_prob", renormalised) else "raw",
        scale=fields("routed_scaling_factor", NUMBER, scale),
        selection_bias=True,
        num_groups=fields.size("n_group", groups[0]),
        num_selected_groups=fields.size("topk_group", groups[1]),
    )


def ungated_shared(
    fields: Fields, unit: GLU, *, count: str = "n_shared_experts", default: int = 1
) -> SharedConfig | None:
    """Shared experts of the routed experts' width, as many as the field ``count`` says; ``None`` for none."""
    number = fields(count, COUNT, default)
    return SharedConfig(number * fields.size("moe_intermediate_size"), unit) if number else None
