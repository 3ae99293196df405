"""Prefill and decode as one compiled program: the loop over tokens never visits the host."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

from moejax.errors import MoejaxError
from moejax.generation.beams import Beams
from moejax.generation.sampled_rows import Draws
from moejax.generation.sampling import Sampling
from moejax.generation.step import Generation, Plan, Turn
from moejax.models import Cache, Decoder, FlatDecoder, unflatten
from moejax.models.data_parallel import REPLICATED, batch_mesh, gate_specs, max_over_devices, shard_map_data, split
from moejax.program import Program
from moejax.rules import Reading


class _Call(NamedTuple):
    """What stays the same over all steps; ``numbers`` are those of the prompts."""

    weights: Decoder | FlatDecoder
    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    numbers: Int[Array | np.ndarray, " B"]
    key: PRNGKeyArray
    sampling: Sampling
    reading: Reading


class _State(NamedTuple):
    """After ``step`` tokens; the cache is that of the rows before the last one was chosen."""

    step: Int[Array, ""]
    cache: Cache
    choice: Draws | Beams


def generate_tokens(
    weights: Decoder | FlatDecoder,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    reading: Reading = Reading(),
    max_time: float | None = None,
    return_scores: bool = False,
) -> Generation:
    """Continue each row of left-padded prompts by up to ``max_new_tokens`` tokens.

    Over a mesh with the axis ``data``, its devices share the prompts. A row draws the same whatever others follow it
    (with keys of the kind ``rbg``, on one device). One that has drawn one of ``eos_ids`` is filled with ``pad_id``
    behind it.

    Args:
        reading: its gates' axis of tokens is 1, and then they hold for all, or ``T + max_new_tokens``.
        max_time: seconds after which no further token is begun (of beam search, one last, with which running beams
            become answers); compiling is not counted. The loop then comes back to the host from time to time, and every
            device computes all rows.
        return_scores: return the scores of every token; takes ``B N V`` numbers, for beams ``B num_beams N V``.

    Raises:
        MoejaxError: a setting that does not fit the model or the others, gates that do not fit the tokens.
    """
    plan = Plan(max_new_tokens, tuple(eos_ids), pad_id, return_scores)
    if sampling.min_new_tokens > max_new_tokens:
        raise MoejaxError(f"min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={max_new_tokens}.")
    _check_words(sampling, weights)
    batch, prompt = tokens.shape
    reading.gates.check(weights.config, np.zeros((batch, prompt + max_new_tokens), np.int32))
    call = _Call(weights, tokens, valid, np.arange(len(tokens), dtype=np.int32), key, sampling, reading)
    if max_time is None:
        return _whole(call, plan)
    if not max_time > 0:
        raise MoejaxError(f"max_time={max_time}: a number of seconds above 0, or None for no limit.")
    return _timed(call, plan, max_time)


def _check_words(sampling: Sampling, weights: Decoder | FlatDecoder) -> None:
    worst = max((max(word) for word in sampling.bad_words), default=-1)
    if worst >= 0 and worst >= (size := weights.config.vocab_size):
        raise MoejaxError(f"bad_words holds token id {worst}, outside the vocabulary of {size}.")


def _prefill(call: _Call, plan: Plan) -> _State:
    """Read the prompts and choose the first token. The last token to be chosen needs no slot: none follows it."""
    decoder, rows = unflatten(call.weights), call.sampling.rows
    batch, prompt = call.tokens.shape
    cache = decoder.empty_cache(batch, prompt + plan.max_new_tokens - 1)
    reading = _during(call.reading, lambda gate: gate[:, :, :prompt])
    logits, cache = _forward(decoder, call.tokens, call.valid, cache, reading)
    if rows > 1:
        each = jnp.repeat(jnp.arange(batch), rows)
        logits, cache = logits[each], _take_rows(cache, each)
    kind = Beams if call.sampling.num_beams > 1 else Draws
    return _choose(call, plan, kind.start(logits, call.sampling, plan), logits, cache, 0, plan.max_new_tokens)


def _decode(call: _Call, state: _State, plan: Plan, until: Int[Array, ""] | int, limit: Int[Array, ""] | int) -> _State:
    """Go on until ``until`` tokens or until no row can; at ``limit`` tokens every row ends."""
    decoder, rows = unflatten(call.weights), call.sampling.rows
    prompt = call.tokens.shape[1]
    # gates that differ by prompt hold for each of its rows
    gates = jax.tree.map(lambda g: g if g.shape[1] == 1 else jnp.repeat(g, rows, axis=1), call.reading.gates)
    reading = replace(call.reading, gates=gates)

    def unfinished(state: _State) -> Array:
        more = (state.step < until) & ~state.choice.finished(call.sampling)
        return max_over_devices(more.astype(jnp.int32)) > 0

    def step(state: _State) -> _State:
        parents = state.choice.parents
        cache = state.cache if parents is None else _take_rows(state.cache, parents)
        newest = jax.lax.dynamic_slice_in_dim(state.choice.written, state.step - 1, 1, axis=1)
        place = prompt + state.step - 1
        of_newest = _during(reading, lambda gate: jax.lax.dynamic_slice_in_dim(gate, place, 1, axis=2))
        logits, cache = _forward(decoder, newest, jnp.ones(newest.shape, bool), cache, of_newest)
        return _choose(call, plan, state.choice, logits, cache, state.step, limit)

    return jax.lax.while_loop(unfinished, step, state)


def _during(reading: Reading, part: Callable[[Array], Array]) -> Reading:
    """With the part of the gates that holds for some tokens; gates for one token hold for all."""
    return replace(reading, gates=jax.tree.map(lambda g: g if g.shape[2] == 1 else part(g), reading.gates))


def _choose(
    call: _Call,
    plan: Plan,
    choice: Draws | Beams,
    logits: Array,
    cache: Cache,
    step: Int[Array, ""] | int,
    limit: Int[Array, ""] | int,
) -> _State:
    history = _history(call, choice, step) if call.sampling.reads_history else None
    turn = Turn(logits, history, step, limit, _keys(call, step))
    return _State(jnp.asarray(step + 1, jnp.int32), cache, choice.choose(turn, call.sampling, plan))


def _keys(call: _Call, step: Int[Array, ""] | int) -> Key[Array, " R"]:
    """A step's own for every row."""
    # keys of the old kind are plain numbers
    typed = jnp.issubdtype(call.key.dtype, jax.dtypes.prng_key)
    key = call.key if typed else jax.random.wrap_key_data(call.key)
    rows = call.sampling.rows
    numbers = (call.numbers[:, None] * rows + np.arange(rows, dtype=np.int32)).reshape(-1)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), numbers)


def _history(call: _Call, choice: Draws | Beams, step: Int[Array, ""] | int) -> Int[Array, "R S"]:
    """Prompt and tokens so far of every row, the newest last, -1 where there is none."""
    prompt = jnp.repeat(jnp.where(call.valid, call.tokens, -1), call.sampling.rows, axis=0)
    room = choice.written.shape[1]
    written = jnp.where(jnp.arange(room) < step, choice.written, -1)
    return jnp.roll(jnp.concatenate([prompt, written], axis=1), room - step, axis=1)


def _result(call: _Call, state: _State, plan: Plan) -> Generation:
    return state.choice.result(state.step, call.sampling, plan)


def _forward(decoder: Decoder, new: Array, valid: Array, cache: Cache, reading: Reading) -> tuple[Array, Cache]:
    """Logits ``[B V]`` behind the last of the ``new`` tokens, and the cache with them."""
    hidden = decoder.hidden(new, valid=valid, cache=cache, reading=reading)
    assert hidden.cache is not None
    return decoder.logits(hidden.stream[:, -1], reading), hidden.cache


def _take_rows(cache: Cache, rows: Int[Array, " R"]) -> Cache:
    def take(x: Array) -> Array:
        # said to be in bounds, it is a plain copy of rows; otherwise each is checked
        return x.at[rows].get(mode="promise_in_bounds")

    return cache._replace(layers=jax.tree.map(take, cache.layers), valid=take(cache.valid))


@partial(Program, static_argnames="plan")
def _whole(call: _Call, plan: Plan) -> Generation:
    def run(call: _Call) -> Generation:
        limit = plan.max_new_tokens
        return _result(call, _decode(call, _prefill(call, plan), plan, limit, limit), plan)

    reading = replace(jax.tree.map(lambda _: REPLICATED, call.reading), gates=gate_specs(call.reading.gates))
    placed = _Call(REPLICATED, split(0), split(0), split(0), REPLICATED, REPLICATED, reading)
    return shard_map_data(run, batch_mesh(call.weights.config), (call,), (placed,), split(0))


# The same in parts. A part's state is the next one's to overwrite, so that there is one cache only.
_jit_prefill = Program(_prefill, static_argnames="plan")
_jit_decode = Program(_decode, static_argnames="plan", donate_argnames="state")
_jit_result = Program(_result, static_argnames="plan")


def _timed(call: _Call, plan: Plan, max_time: float) -> Generation:
    """Decode in parts, each as long as half of the time left should allow, so that the overrun is about one step."""
    limit = plan.max_new_tokens
    # no steps: compiles the loop while the device reads the prompt
    state = _jit_decode(call, _jit_prefill(call, plan), plan, 1, limit)
    end, pace = time.monotonic() + max_time, float("inf")
    while not bool(state.choice.finished(call.sampling)) and (step := int(state.step)) < limit:
        begun = time.monotonic()
        if begun >= end:
            # running beams become answers in a last step, as they do in transformers
            if call.sampling.num_beams > 1:
                state = _jit_decode(call, state, plan, step + 1, step + 1)
            break
        count = max(1, int((end - begun) / pace / 2))
        state = jax.block_until_ready(_jit_decode(call, state, plan, min(step + count, limit), limit))
        pace = (time.monotonic() - begun) / count
    return _jit_result(call, state, plan)
