"""Prefill and decode as one compiled program: the loop over tokens never visits the host."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.generation.sampling import Sampling
from moejax.models import Cache, Decoder, Packed, unpack
from moejax.rules import Reading


class _State(NamedTuple):
    step: Int[Array, ""]
    cache: Cache
    logits: Float[Array, "B V"]
    tokens: Int[Array, "B N"]
    done: Bool[Array, " B"]
    key: PRNGKeyArray


@partial(jax.jit, static_argnames=("max_new_tokens", "sampling", "eos_ids", "pad_id"))
def generate_tokens(
    weights: Decoder | Packed,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    reading: Reading = Reading(),
) -> Int[Array, "B N"]:
    """Continue each row of left-padded prompts by up to ``max_new_tokens`` tokens.

    A row that has drawn one of ``eos_ids`` is filled with ``pad_id`` behind it. The gates of ``reading`` apply to the
    prompt and must broadcast over tokens (size 1 there) to apply to the new tokens as well.
    """
    decoder = unpack(weights)
    batch, prompt = tokens.shape

    def advance(new: Array, valid: Array, cache: Cache) -> tuple[Array, Cache]:
        hidden = decoder.hidden(new, valid=valid, cache=cache, reading=reading)
        assert hidden.cache is not None
        return decoder.logits(hidden.stream[:, -1], reading), hidden.cache

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def step(state: _State) -> _State:
        key, draw_key = jax.random.split(state.key)
        drawn = sampling.draw(state.logits, draw_key).astype(jnp.int32)
        drawn = jnp.where(state.done, pad_id, drawn)
        done = state.done | jnp.isin(drawn, jnp.array(eos_ids, jnp.int32))
        written = jax.lax.dynamic_update_slice_in_dim(state.tokens, drawn[:, None], state.step, axis=1)
        logits, cache = advance(drawn[:, None], jnp.ones((batch, 1), bool), state.cache)
        return _State(state.step + 1, cache, logits, written, done, key)

    logits, cache = advance(tokens, valid, decoder.empty_cache(batch, prompt + max_new_tokens))
    out = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    start = _State(jnp.zeros((), jnp.int32), cache, logits, out, jnp.zeros(batch, bool), key)
    return jax.lax.while_loop(unfinished, step, start).tokens
