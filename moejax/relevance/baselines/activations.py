"""Activations of one prompt, read by one backward pass: norms of experts' outputs and attention patterns."""

from dataclasses import replace

import jax.numpy as jnp

from moejax.processes import to_host
from moejax.relevance.engine import Readout, relevance
from moejax.relevance.question import ResolvedTarget
from moejax.relevance.seeds import LogitSeeds
from moejax.rules import Activations, Gates


def read_activations(resolved: ResolvedTarget, nodes: tuple[str, ...] = ()) -> Readout:
    """Read norms and patterns of one prompt (:class:`Activations`), without padding and on the host.

    Every layer takes part in the backward pass, whatever the target.
    """
    lm, seeds, length = resolved.lm, resolved.seeds, resolved.length
    if not isinstance(seeds, LogitSeeds):
        last, one = jnp.full((1, 1), length - 1), jnp.ones((1, 1, 1), lm.decoder.accumulation_dtype)
        seeds = LogitSeeds.of(last, jnp.zeros(one.shape, jnp.int32), one)
    out = relevance(lm.flat, resolved.tokens(), None, seeds, Gates(), rule=Activations(), nodes=nodes, joint=True)
    return to_host(replace(out, logits=None)).cut(length)
