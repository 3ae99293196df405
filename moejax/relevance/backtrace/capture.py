"""The values at every node: one forward pass, read by taps that hand back what they see."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.models import Decoder, Packed, unpack
from moejax.relevance.backtrace.nodes import EMBEDDINGS, HEAD, NORM, PARTS
from moejax.rules import Reading


@jax.custom_vjp
def _seen(x: Array, tap: Array) -> Array:
    """``x``; the cotangent of ``tap`` is ``x`` itself, whatever comes from behind."""
    return x


_seen.defvjp(lambda x, tap: (x, (x, tap)), lambda saved, c: (c, saved[0].astype(saved[1].dtype)))


class _Recording(Reading):
    """A reading whose taps are read as the values at their nodes."""

    def tap(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return _seen(x, self.taps[name]) if name in self.taps else x


jax.tree_util.register_dataclass(_Recording, data_fields=["gates", "probes", "taps"], meta_fields=["rule"])


@jax.jit
def values(weights: Decoder | Packed, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> dict[str, Array]:
    """The value at each of the engine's nodes, of the final norm (``"norm"``) and the logits (``"head"``).

    Nothing is propagated back: what the taps hand back does not depend on it, so the compiler leaves it out.
    """
    decoder = unpack(weights)
    layers, shape = decoder.config.num_layers, (*tokens.shape, decoder.config.model_dim)
    dtype = jnp.promote_types(decoder.embedding.dtype, jnp.float32)
    taps = {f"{node}.{i}": jnp.zeros(shape, dtype) for node in PARTS for i in range(layers)}

    def run(taps: dict[str, Array]) -> tuple[Array, Array]:
        stream = decoder.hidden(tokens, valid=valid, reading=_Recording(taps=taps)).stream
        return stream.astype(dtype).sum(), stream

    found, stream = jax.grad(run, has_aux=True)(taps)
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
