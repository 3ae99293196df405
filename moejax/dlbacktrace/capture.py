"""The values that enter and leave every node."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.dlbacktrace.nodes import EMBEDDINGS, HEAD, NORM, PARTS
from moejax.models import Decoder, FlatDecoder, unflatten
from moejax.models.activations import widened
from moejax.program import Program
from moejax.rules import Reading


@Program
def node_values(flat: Decoder | FlatDecoder, tokens: Int[Array, "B W"], valid: Bool[Array, "B W"]) -> dict[str, Array]:
    """Values at each of the engine's nodes, after the final norm (``"norm"``), and the logits (``"head"``)."""
    decoder = unflatten(flat)
    layers, dtype = decoder.config.num_layers, jnp.promote_types(decoder.embedding.dtype, jnp.float32)
    reading = Reading(names=tuple(f"{node}.{i}" for node in PARTS for i in range(layers)))
    hidden = decoder.hidden(tokens, valid=valid, reading=reading)
    stream = hidden.stream
    norm, head = decoder.norm(stream, Reading()), decoder.logits(stream)
    return widened(hidden.nodes) | {f"stream.{layers}": stream.astype(dtype), "norm": norm.astype(dtype), "head": head}


def by_node(values: dict[str, Any], ids: Any, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What enters and what leaves each of DLBacktrace's nodes, from the result of :func:`node_values`."""
    entering, leaving = {EMBEDDINGS: ids}, {EMBEDDINGS: values["stream.0"]}
    for i in range(layers):
        steps = (
            (f"decoder_layer_norm_{i}_0", "stream", "attention_norm"),
            (f"decoder_self_attention_{i}", "attention_norm", "attention"),
            (f"decoder_residual_self_attention_{i}", None, "middle"),
            (f"decoder_layer_norm_{i}_1", "middle", "feed_forward_norm"),
            (f"decoder_feed_forward_{i}", "feed_forward_norm", "feed_forward"),
        )
        for node, into, out in steps:
            leaving[node] = values[f"{out}.{i}"]
            if into is not None:
                entering[node] = values[f"{into}.{i}"]
        leaving[f"decoder_residual_feed_forward_{i}"] = values[f"stream.{i + 1}"]
    entering |= {NORM: values[f"stream.{layers}"], HEAD: values["norm"]}
    return entering, leaving | {NORM: values["norm"], HEAD: values["head"]}
