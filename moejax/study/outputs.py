"""Similarity of the outputs of a token's experts."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.models import Decoder, Hidden
from moejax.ops.experts import assign
from moejax.routing.statistics import token_diversity
from moejax.rules import Gates, Reading
from moejax.study.data import WindowBatch


def output_similarity(
    decoder: Decoder, hidden: Hidden, layer: int, batch: WindowBatch
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Mean pairwise cosine of the outputs of a token's feed-forward experts, and true where it has two or more.

    The experts read the residual stream after attention. To recompute it, the layer runs again with the gate of its
    feed-forward experts at zero. Only routed experts with a weight that is not zero count; zero-computation experts do
    not.
    """
    block, routing = decoder.layers[layer], hidden.routing()[layer]
    assert routing is not None
    off = Reading(gates=Gates(feed_forward=jnp.zeros((1, 1, 1))))
    alone = replace(decoder, layers=[block])
    middle = alone.hidden(batch.tokens, valid=batch.valid, embedded=hidden.entering[layer], reading=off).stream
    mixture: Any = block.feed_forward
    count, slots = mixture.experts.down.shape[0], routing.ids.shape[-1]
    computes = (routing.weights != 0) & (routing.ids < count)
    assignment = assign(jnp.where(computes, routing.ids, count).reshape(-1, slots), count, allow_unassigned=True)
    normed = middle if block.feed_forward_norm is None else block.feed_forward_norm(middle, Reading())
    outputs = mixture.experts(normed[:, :, None], assignment, Reading())
    return token_diversity(outputs, computes)
