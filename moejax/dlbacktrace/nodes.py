"""The nodes that relevance is told at: their names, their graph, and the engine's nodes behind them."""

from collections.abc import Mapping
from typing import Any

from moejax.models import Config, Decoder

EMBEDDINGS, NORM, HEAD = "decoder_embeddings", "decoder_layer_norm", "decoder_lm_head"
EXPERT_SUFFIX = "_expert"

Node = dict[str, Any]


def stack(layers: int) -> list[str]:
    """All ``3 + 6 L`` nodes, the output first."""
    parts = ("residual_feed_forward_{}", "feed_forward_{}", "layer_norm_{}_1")
    parts += ("residual_self_attention_{}", "self_attention_{}", "layer_norm_{}_0")
    return [HEAD, NORM, *(f"decoder_{p.format(i)}" for i in reversed(range(layers)) for p in parts), EMBEDDINGS]


def graph(config: Config) -> dict[str, Node]:
    """The graph of the nodes: class, place (on the residual stream or on a branch) and neighbours of each.

    ``child`` are the nodes that it hands relevance to, ``parent`` those that it has relevance from.
    """
    found: dict[str, Node] = {}

    def add(name: str, kind: str, place: str, *child: str) -> None:
        found[name] = {"name": name, "class": kind, "type": place, "parent": [], "child": list(child)}

    add(HEAD, "LM_Head", "stream", NORM)
    add(NORM, "Layer_Norm", "stream", f"decoder_residual_feed_forward_{config.num_layers - 1}")
    for i in reversed(range(config.num_layers)):
        block, residual = config.blocks[i], f"decoder_residual_self_attention_{i}"
        before = f"decoder_residual_feed_forward_{i - 1}" if i else EMBEDDINGS
        feed_forward, attention = f"decoder_feed_forward_{i}", f"decoder_self_attention_{i}"
        mixture = block.half("attention").sizes.num_experts > 0
        experts = block.half("feed_forward").sizes.num_experts > 0
        add(f"decoder_residual_feed_forward_{i}", "Residual", "stream", residual, feed_forward)
        add(feed_forward, "Mixture_of_Experts" if experts else "MLP", "branch", f"decoder_layer_norm_{i}_1")
        add(f"decoder_layer_norm_{i}_1", "Layer_Norm", "branch", residual)
        add(residual, "Residual", "stream", before, attention)
        add(attention, "Mixture_of_Attention" if mixture else "Self_Attention", "branch", f"decoder_layer_norm_{i}_0")
        add(f"decoder_layer_norm_{i}_0", "Layer_Norm", "branch", before)
    add(EMBEDDINGS, "Embeddings", "stream")
    for name, node in found.items():
        for child in node["child"]:
            found[child]["parent"].append(name)
    return found


def weights(decoder: Decoder) -> dict[str, Any]:
    """The parameters of every node that has any."""
    found: dict[str, Any] = {EMBEDDINGS: decoder.embedding, NORM: decoder.norm, HEAD: decoder.output_embedding}
    for i, layer in enumerate(decoder.layers):
        found[f"decoder_layer_norm_{i}_0"] = layer.attention_norm
        found[f"decoder_self_attention_{i}"] = layer.attention
        found[f"decoder_layer_norm_{i}_1"] = layer.feed_forward_norm
        found[f"decoder_feed_forward_{i}"] = layer.feed_forward
    return found


PARTS = ("stream", "attention_norm", "attention", "middle", "feed_forward_norm", "feed_forward")
"""The engine's nodes of a layer that ours are made of."""


def engine_nodes(layers: int) -> tuple[str, ...]:
    """The engine's nodes that :func:`from_engine` needs."""
    return (*(f"{part}.{i}" for i in range(layers) for part in PARTS), f"stream.{layers}")


def from_engine(vectors: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Relevance by our names, from that at the engine's nodes; all nodes but the head.

    The final norm's is that of what enters it; under a rule that leaks at norms, what leaves it has more or less.
    """
    found = {NORM: vectors[f"stream.{layers}"], EMBEDDINGS: vectors["stream.0"]}
    for i in range(layers):
        found[f"decoder_layer_norm_{i}_0"] = vectors[f"attention_norm.{i}"]
        found[f"decoder_self_attention_{i}"] = vectors[f"attention.{i}"]
        found[f"decoder_residual_self_attention_{i}"] = vectors[f"middle.{i}"]
        found[f"decoder_layer_norm_{i}_1"] = vectors[f"feed_forward_norm.{i}"]
        found[f"decoder_feed_forward_{i}"] = vectors[f"feed_forward.{i}"]
        found[f"decoder_residual_feed_forward_{i}"] = vectors[f"stream.{i + 1}"]
    return found


def expert_keys(config: Config) -> dict[str, tuple[int, bool]]:
    """The mixtures by the names their experts' relevance has: layer, and whether it is one of attention experts."""
    found: dict[str, tuple[int, bool]] = {}
    for i, block in enumerate(config.blocks):
        if block.half("attention").sizes.num_experts:
            found[f"decoder_self_attention_{i}_attention{EXPERT_SUFFIX}"] = (i, True)
        if block.half("feed_forward").sizes.num_experts:
            found[f"decoder_feed_forward_{i}_ff{EXPERT_SUFFIX}"] = (i, False)
    return found


def node_of(expert_key: str) -> str:
    """The node whose experts a key names."""
    return expert_key.rpartition("_")[0].rpartition("_")[0]
