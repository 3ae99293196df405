"""What several families publish alike."""

from moejax.models.keys import KeyTable, merged_halves, per_expert, stacked, whole

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
    f"layers.{{layer}}.attention.{name}.{part}": [whole(f"{ATTENTION}{key}_proj.{part}")]
    for name, key in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
    for part in ("weight", "bias")
} | {
    "layers.{layer}.attention.query_norm.weight": [whole(ATTENTION + "q_norm.weight")],
    "layers.{layer}.attention.key_norm.weight": [whole(ATTENTION + "k_norm.weight")],
}
"""Attention with four projections and norms of queries and keys."""

DENSE: KeyTable = {
    "layers.{layer}.feed_forward.input": [stacked(MLP + "gate_proj.weight", MLP + "up_proj.weight")],
    "layers.{layer}.feed_forward.output": [whole(MLP + "down_proj.weight")],
}
"""Layers without experts."""


def experts(block: str = "mlp.", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> KeyTable:
    """A mixture whose experts are published one by one, or fused as transformers 5 holds them."""
    one, fused = LAYER + block + "experts.{expert}.", LAYER + "mlp.experts."
    return {
        "layers.{layer}.feed_forward.router.linear.weight": [
            whole(LAYER + "mlp.gate.weight"),
            whole(LAYER + block + "gate.weight"),
        ],
        "layers.{layer}.feed_forward.gate_up": [
            merged_halves(fused + "gate_up_proj"),
            per_expert(f"{one}{gate}.weight", f"{one}{up}.weight"),
        ],
        "layers.{layer}.feed_forward.down": [whole(fused + "down_proj"), per_expert(f"{one}{down}.weight")],
    }
