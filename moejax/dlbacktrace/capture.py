"""The values at every node."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.dlbacktrace.nodes import EMBEDDINGS, HEAD, NORM, PARTS
from moejax.models import Decoder, FlatDecoder, record, unflatten
from moejax.program import Program
from moejax.rules import Reading


@Program
def values(weights: Decoder | FlatDecoder, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> dict[str, Array]:
    """The value at each of the engine's nodes, of the final norm (``"norm"``) and the logits (``"head"``)."""
    decoder = unflatten(weights)
    layers, dtype = decoder.config.num_layers, jnp.promote_types(decoder.embedding.dtype, jnp.float32)
    found, stream = record(decoder, tokens, valid, [f"{node}.{i}" for node in PARTS for i in range(layers)])
    norm, head = decoder.norm(stream, Reading()), decoder.logits(stream)
    return found | {f"stream.{layers}": stream.astype(dtype), "norm": norm.astype(dtype), "head": head}


def by_node(found: dict[str, Any], ids: Any, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What enters and what leaves each node, from what :func:`values` found."""
    entering, leaving = {EMBEDDINGS: ids}, {EMBEDDINGS: found["stream.0"]}
    for i in range(layers):
        steps = (
            (f"decoder_layer_norm_{i}_0", "stream", "attention_norm"),
            (f"decoder_self_attention_{i}", "attention_norm", "attention"),
            (f"decoder_residual_self_attention_{i}", None, "middle"),
            (f"decoder_layer_norm_{i}_1", "middle", "feed_forward_norm"),
            (f"decoder_feed_forward_{i}", "feed_forward_norm", "feed_forward"),
        )
        for node, into, out in steps:
            leaving[node] = found[f"{out}.{i}"]
            if into is not None:
                entering[node] = found[f"{into}.{i}"]
        leaving[f"decoder_residual_feed_forward_{i}"] = found[f"stream.{i + 1}"]
    entering |= {NORM: found[f"stream.{layers}"], HEAD: found["norm"]}
    return entering, leaving | {NORM: found["norm"], HEAD: found["head"]}
