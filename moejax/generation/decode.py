"""Prefill and decoding as one compiled program: the loop over tokens runs on the device without the host."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from moejax.errors import MoejaxError
from moejax.generation.beams import Beams
from moejax.generation.sampled_rows import SampledRows
from moejax.generation.sampling import Sampling
from moejax.generation.step import DecodeStep, Generation, StaticOptions
from moejax.models import Cache, Decoder, FlatDecoder, unflatten
from moejax.models.activations import edit_specs
from moejax.models.data_parallel import (
    REPLICATED,
    Placement,
    batch_mesh,
    gate_specs,
    max_over_devices,
    placed,
    placements,
    shard_map_data,
    split,
)
from moejax.models.node_table import checked_edits
from moejax.program import Program
from moejax.rules import Reading


@runtime_checkable
class Watch(Protocol):
    """Looks at new tokens while they are generated."""

    @property
    def every(self) -> int:
        """How many tokens are generated between two looks."""
        ...

    def __call__(self, tokens: Int[np.ndarray, "B A"]) -> bool:
        """Look at all new tokens so far; return true to end the generation."""
        ...


def _reading_specs(reading: Reading) -> Placement:
    """The placement of a reading: gates and edits that differ by prompt are split with the prompts."""
    whole = jax.tree.map(lambda _: REPLICATED, reading)
    return replace(whole, gates=gate_specs(reading.gates), edits=edit_specs(reading.edits))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Call:
    """What stays the same over all steps.

    Attributes:
        flat: the model.
        tokens: left-padded prompts.
        valid: True at the tokens of the prompts, False at padding.
        prompt_index: index of each prompt in the batch; a device of a mesh holds some of the prompts only.
        key: random key from which the keys of all steps and rows are folded.
        sampling: how tokens are chosen.
        reading: gates and edits, for the prompt and all new tokens.
    """

    flat: Decoder | FlatDecoder = placed()
    tokens: Int[Array, "B T"] = placed(sequences=0)
    valid: Bool[Array, "B T"] = placed(sequences=0)
    prompt_index: Int[Array | np.ndarray, " B"] = placed(sequences=0)
    key: PRNGKeyArray = placed()
    sampling: Sampling = placed()
    reading: Reading = placed(sequences=_reading_specs)


class _State(NamedTuple):
    """The state of the loop after ``num_chosen`` new tokens.

    Attributes:
        num_chosen: number of tokens that each row has chosen.
        cache: keys and values of the prompts and of all new tokens but the last; its rows are in the order from before
            the last token was chosen (see ``choice.parents``).
        choice: the tokens chosen so far.
        finite: whether the largest logit of every step so far was finite, for each row that was computed.
    """

    num_chosen: Int[Array, ""]
    cache: Cache
    choice: SampledRows | Beams
    finite: Bool[Array, " Q"]


def generate_tokens(
    flat: Decoder | FlatDecoder,
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
    watch: Watch | None = None,
) -> Generation:
    """Continue each row of left-padded prompts by up to ``max_new_tokens`` tokens.

    Over a mesh with the axis ``data``, the prompts are split among its devices. A row's draws do not depend on the rows
    that follow it (with keys of the kind ``rbg``: on one device only). A row that has chosen one of ``eos_ids`` is
    filled with ``pad_id`` from there on.

    Args:
        flat: the model, a flat decoder or a decoder.
        tokens: token ids of the prompts, aligned at their ends.
        valid: True at the tokens of the prompts, False at padding.
        key: random key of the draws.
        sampling: how tokens are chosen.
        reading: gates, edits and rule. The gates' axis of tokens is 1, and then they apply to all tokens, or
            ``T + max_new_tokens``. Edits apply to all tokens, or to those that they name, counted from the first real
            token of each prompt.
        max_time: seconds after which no further token is begun (beam search takes one last step, in which running beams
            become answers). Compiling is not counted. The loop then returns to the host from time to time, and every
            device computes all rows.
        return_scores: return the scores that every token was chosen from, ``[B A V]``, and in beam search ``log_probs``
            too. While beams are searched, ``B W A V`` numbers are held.
        watch: is shown the new tokens while they are generated, and may end the generation. Not with beam search.

    Returns:
        The new tokens, with A = ``max_new_tokens``; B counts answers, which may be several for a prompt.

    Raises:
        MoejaxError: a setting that does not fit the model or another setting, or gates that do not fit the tokens.
    """
    options = StaticOptions(max_new_tokens, tuple(eos_ids), pad_id, return_scores)
    if sampling.min_new_tokens > max_new_tokens:
        raise MoejaxError(f"min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={max_new_tokens}.")
    _check_words(sampling, flat)
    batch, prompt = tokens.shape
    reading.gates.check(flat.config, np.zeros((batch, prompt + max_new_tokens), np.int32))
    edits = checked_edits(flat.config, reading.edits, (batch, prompt + max_new_tokens), generates=True)
    reading = replace(reading, edits=edits.as_data())
    call = _Call(flat, tokens, valid, np.arange(len(tokens), dtype=np.int32), key, sampling, reading)
    if watch is not None and sampling.num_beams > 1:
        raise MoejaxError("beam search has no answer before its end: leave streamer and stop_strings out.")
    if max_time is not None and not max_time > 0:
        raise MoejaxError(f"max_time={max_time}: a number of seconds above 0, or None for no limit.")
    if max_time is None and watch is None:
        return _generate(call, options)
    return _generate_in_parts(call, options, float("inf") if max_time is None else max_time, watch)


def _check_words(sampling: Sampling, flat: Decoder | FlatDecoder) -> None:
    largest = max((max(word) for word in sampling.bad_words), default=-1)
    if largest >= 0 and largest >= (size := flat.config.vocab_size):
        raise MoejaxError(f"bad_words holds token id {largest}, outside the vocabulary of {size}.")


def _prefill(call: _Call, options: StaticOptions) -> _State:
    """Read the prompts and choose the first token of each row."""
    decoder, rows = unflatten(call.flat), call.sampling.rows_per_prompt
    batch, prompt = call.tokens.shape
    # no token follows the last one, so it needs no cache position
    cache = decoder.empty_cache(batch, prompt + options.max_new_tokens - 1)
    reading = _for_tokens(call.reading, lambda gate: gate[:, :, :prompt])
    logits, cache = _forward(decoder, call.tokens, call.valid, cache, reading)
    if rows > 1:
        prompt_of_row = jnp.repeat(jnp.arange(batch), rows)
        logits, cache = logits[prompt_of_row], _take_rows(cache, prompt_of_row)
    kind = Beams if call.sampling.num_beams > 1 else SampledRows
    choice = kind.start(logits, call.sampling, options)
    return _choose(call, options, choice, logits, cache, 0, options.max_new_tokens, jnp.ones(len(logits), bool))


def _decode(
    call: _Call, state: _State, options: StaticOptions, until: Int[Array, ""] | int, limit: Int[Array, ""] | int
) -> _State:
    """Choose tokens until each row has ``until`` of them or no row can go on; at ``limit`` tokens every row ends."""
    decoder, rows = unflatten(call.flat), call.sampling.rows_per_prompt
    prompt = call.tokens.shape[1]
    # gates and edits that differ by prompt apply to each of its rows
    gates = jax.tree.map(lambda g: g if g.shape[1] == 1 else jnp.repeat(g, rows, axis=1), call.reading.gates)
    edits = call.reading.edits.with_values(lambda v: v if v.shape[0] == 1 else jnp.repeat(v, rows, axis=0))
    reading = replace(call.reading, gates=gates, edits=edits)

    def unfinished(state: _State) -> Array:
        more = (state.num_chosen < until) & ~state.choice.finished(call.sampling)
        return max_over_devices(more.astype(jnp.int32)) > 0

    def step(state: _State) -> _State:
        parents = state.choice.parents
        cache = state.cache if parents is None else _take_rows(state.cache, parents)
        newest = jax.lax.dynamic_slice_in_dim(state.choice.written, state.num_chosen - 1, 1, axis=1)
        position = prompt + state.num_chosen - 1
        reading_now = _for_tokens(reading, lambda gate: jax.lax.dynamic_slice_in_dim(gate, position, 1, axis=2))
        logits, cache = _forward(decoder, newest, jnp.ones(newest.shape, bool), cache, reading_now)
        return _choose(call, options, state.choice, logits, cache, state.num_chosen, limit, state.finite)

    return jax.lax.while_loop(unfinished, step, state)


def _for_tokens(reading: Reading, select: Callable[[Array], Array]) -> Reading:
    """``reading`` with the part of its gates that ``select`` takes; gates for one token apply to all."""
    return replace(reading, gates=jax.tree.map(lambda g: g if g.shape[2] == 1 else select(g), reading.gates))


def _choose(
    call: _Call,
    options: StaticOptions,
    choice: SampledRows | Beams,
    logits: Float[Array, "Q V"],
    cache: Cache,
    num_chosen: Int[Array, ""] | int,
    limit: Int[Array, ""] | int,
    finite: Bool[Array, " Q"],
) -> _State:
    """The state after one more token of each row, chosen from ``logits``."""
    history = _history(call, choice, num_chosen) if call.sampling.reads_history else None
    step = DecodeStep(logits, history, num_chosen, limit, _keys(call, num_chosen))
    # the maximum is NaN if any logit is; the host looks at it once, at the end
    finite = finite & jnp.isfinite(logits.max(-1))
    return _State(jnp.asarray(num_chosen + 1, jnp.int32), cache, choice.choose(step, call.sampling, options), finite)


def _keys(call: _Call, num_chosen: Int[Array, ""] | int) -> Key[Array, " Q"]:
    """Random keys of one step, one for each row."""
    # raw keys (jax.random.PRNGKey) are arrays of numbers
    typed = jnp.issubdtype(call.key.dtype, jax.dtypes.prng_key)
    key = call.key if typed else jax.random.wrap_key_data(call.key)
    rows = call.sampling.rows_per_prompt
    row_index = (call.prompt_index[:, None] * rows + np.arange(rows, dtype=np.int32)).reshape(-1)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, num_chosen), row_index)


def _history(call: _Call, choice: SampledRows | Beams, num_chosen: Int[Array, ""] | int) -> Int[Array, "Q Z"]:
    """Prompt and new tokens of every row, the newest last, with -1 at padding before the prompt."""
    prompt = jnp.repeat(jnp.where(call.valid, call.tokens, -1), call.sampling.rows_per_prompt, axis=0)
    room = choice.written.shape[1]
    written = jnp.where(jnp.arange(room) < num_chosen, choice.written, -1)
    return jnp.roll(jnp.concatenate([prompt, written], axis=1), room - num_chosen, axis=1)


def _result(call: _Call, state: _State, options: StaticOptions) -> Generation:
    finite = state.finite.reshape(len(call.tokens), -1).all(-1)
    return state.choice.result(state.num_chosen, call.sampling, options)._replace(finite=finite)


def _forward(
    decoder: Decoder, new: Int[Array, "Q T"], valid: Bool[Array, "Q T"], cache: Cache, reading: Reading
) -> tuple[Float[Array, "Q V"], Cache]:
    """Logits behind the last of the ``new`` tokens, and the cache with the new tokens in it."""
    hidden = decoder.hidden(new, valid=valid, cache=cache, reading=reading)
    assert hidden.cache is not None
    return decoder.logits(hidden.stream[:, -1], reading), hidden.cache


def _take_rows(cache: Cache, rows: Int[Array, " Q"]) -> Cache:
    """The given rows of the cache."""

    def take(x: Array) -> Array:
        # promised to be in bounds, the rows are copied without a check of each index
        return x.at[rows].get(mode="promise_in_bounds")

    return cache._replace(layers=jax.tree.map(take, cache.layers), valid=take(cache.valid))


@partial(Program, static_argnames="options")
def _generate(call: _Call, options: StaticOptions) -> Generation:
    """Prefill, the loop and the result as one program; over a mesh, each device takes its share of the prompts."""

    def run(call: _Call) -> Generation:
        limit = options.max_new_tokens
        return _result(call, _decode(call, _prefill(call, options), options, limit, limit), options)

    return shard_map_data(run, batch_mesh(call.flat.config), (call,), (placements(call, "sequences"),), split(0))


# The same as three programs, for a limit of time and for those who look on. _jit_decode overwrites the state that it is
# given, so that there is only one cache.
_jit_prefill = Program(_prefill, static_argnames="options")
_jit_decode = Program(_decode, static_argnames="options", donate_argnames="state")
_jit_result = Program(_result, static_argnames="options")


def _generate_in_parts(call: _Call, options: StaticOptions, max_time: float, watch: Watch | None) -> Generation:
    """Generate within ``max_time`` seconds, while ``watch`` looks on.

    Runs the loop in parts. Each part is as many steps as should take half of the time left, so that the limit is
    exceeded by about one step, and at most as many as ``watch`` wants between two looks.
    """
    limit = options.max_new_tokens
    # until=1 takes no steps: the loop is compiled while the device reads the prompt
    state = _jit_decode(call, _jit_prefill(call, options), options, 1, limit)
    end, seconds_per_step = time.monotonic() + max_time, float("inf")
    while not bool(state.choice.finished(call.sampling)) and (num_chosen := int(state.num_chosen)) < limit:
        begun = time.monotonic()
        if watch is not None and watch(np.asarray(state.choice.written)[:, :num_chosen]):
            break
        if begun >= end:
            # in a last step running beams become answers, as in transformers
            if call.sampling.num_beams > 1:
                state = _jit_decode(call, state, options, num_chosen + 1, num_chosen + 1)
            break
        steps = limit if max_time == float("inf") else max(1, int((end - begun) / seconds_per_step / 2))
        steps = steps if watch is None else min(steps, watch.every)
        state = jax.block_until_ready(_jit_decode(call, state, options, min(num_chosen + steps, limit), limit))
        seconds_per_step = (time.monotonic() - begun) / steps
    return _jit_result(call, state, options)
