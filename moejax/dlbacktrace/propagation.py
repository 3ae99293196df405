"""Relevance of many starts from one forward pass, and what a start's relevance looks like."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from moejax.dlbacktrace.inputs import Batch
from moejax.dlbacktrace.nodes import HEAD, engine_nodes, expert_keys, from_engine, node_of, stack
from moejax.errors import MoejaxError
from moejax.layers.linear import matmul_f32_accum
from moejax.lm import LM
from moejax.models import Decoder, Hidden
from moejax.relevance.engine import Readout, relevance
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import ExpertRelevance
from moejax.relevance.seeds import LogitSeeds, TargetValues
from moejax.rules import Gates, Reading, Rule

CHUNK_BYTES = 2**30
"""Room for the vectors of the starts that are propagated together."""


@dataclass(frozen=True)
class StepRelevance:
    """Relevance of one start.

    Attributes:
        nodes: of every number at every node, ``[B T D]``, of the head ``[B T V]``.
        experts: of each expert for each token, ``[T E]``, with several rows ``[B T E]``.
        ledger: what went in and where it went, a target for each row.
    """

    nodes: dict[str, Float[np.ndarray, "B T _"]]
    experts: dict[str, Float[np.ndarray, "*b T E"]]
    ledger: Ledger

    def rescaled(self, total: float | int, largest: float | int) -> "StepRelevance":
        """Every node, its experts with it, times one number: first to sum to ``total``, then to stay in ``largest``.

        Zero leaves the sum, or the size, as it is. A node whose sum is zero has no other.
        """
        if not total and not largest:
            return self
        factors = {name: _factor(value, total, largest) for name, value in self.nodes.items()}
        nodes = {name: value * factors[name][:, None, None] for name, value in self.nodes.items()}
        experts = {
            key: value * factors[node_of(key)].reshape(-1, *[1] * (value.ndim - 1))
            for key, value in self.experts.items()
        }
        return replace(self, nodes=nodes, experts=experts)


def _factor(value: np.ndarray, total: float | int, largest: float | int) -> Float[np.ndarray, " B"]:
    factor = np.ones(len(value), value.dtype)
    if total:
        sums = value.sum((1, 2), dtype=np.float64)
        factor = np.where(sums == 0, 1, total / np.where(sums == 0, 1, sums)).astype(value.dtype)
    if largest:
        size = np.abs(value).max((1, 2)) * np.abs(factor)
        factor = factor * np.where(size > largest, largest / np.where(size == 0, 1, size), 1)
    return factor.astype(value.dtype)


class StartWeights(NamedTuple):
    """One start: given relevance of the logits at some positions."""

    positions: Int[Array, "B P"]
    weights: Float[Array, "B P V"]
    num_targets = 1

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        last = reading.for_layer(-1)
        stream = jnp.take_along_axis(hidden.stream, self.positions[..., None], axis=1)
        logits = last.linear(matmul_f32_accum, decoder.norm(stream, last), decoder.output_embedding)
        # relevance is value times cotangent; a logit of zero can have none
        value = stop_gradient(logits)
        cotangent = jnp.where(value == 0, 0, self.weights / jnp.where(value == 0, 1, value))
        target = (logits * cotangent).sum((1, 2))[:, None]
        return TargetValues(target, jnp.zeros((*target.shape, 0), jnp.int32), value[:, -1:])


class Run(NamedTuple):
    """What is explained: a whole batch, its first ``prompt`` columns given, the others generated."""

    lm: LM
    rule: Rule
    batch: Batch
    prompt: int


def of_tokens(
    run: Run, tokens: Int[np.ndarray, "B N"], steps: Sequence[int], multiplier: float | int
) -> Iterator[tuple[int, StepRelevance]]:
    """Relevance of the logits of ``tokens``, those of ``steps``, each on what stands before it; a row that has ended
    has none. As many as fit into :data:`CHUNK_BYTES` are propagated together.

    Args:
        multiplier: relevance of each at the start.
    """
    lm, batch = run.lm, run.batch
    engine = engine_nodes(lm.config.num_layers)
    size = len(batch.ids) * batch.width * lm.config.model_dim * 4 * len(engine)
    chunk = max(1, min(len(steps), CHUNK_BYTES // size))
    for first in range(0, len(steps), chunk):
        now = list(steps[first : first + chunk])
        # the last chunk is filled up, not compiled anew
        padded = now + now[-1:] * (chunk - len(now))
        columns = run.prompt - 1 + np.array(padded)
        positions, live = _positions(batch, run.prompt, padded)
        chosen = np.where(live, tokens[:, padded], 0)
        dtype = lm.decoder.accumulation_dtype
        seeds = LogitSeeds.of(
            jnp.asarray(positions, jnp.int32),
            jnp.asarray(chosen[..., None], jnp.int32),
            jnp.asarray(live[..., None], dtype),
        )
        out = _read(run, seeds, engine)
        for n, step in enumerate(now):
            value = out.target[:, n].astype(np.float64)
            factor = np.where(value == 0, 0, multiplier / np.where(value == 0, 1, value))
            found = _step(run, out, n, factor, int(columns[n]) + 1)
            last = _last(batch, int(columns[n]))
            found.nodes[HEAD][np.arange(len(value)), last, chosen[:, n]] = np.where(value == 0, 0, multiplier)
            yield step, found


def of_weights(run: Run, weights: Float[np.ndarray, "B T V"]) -> tuple[StepRelevance, Float[np.ndarray, "B V"]]:
    """Relevance of given relevance at the logits, and the logits at the last column that has any.

    Raises:
        MoejaxError: the weights do not fit the batch, are nowhere, or stand at padding.
    """
    batch = run.batch
    expected = (*batch.ids.shape, run.lm.config.vocab_size)
    if weights.shape != expected:
        raise MoejaxError(f"start_wt has shape {list(weights.shape)}; the logits it stands for have {list(expected)}.")
    used = weights.any(2)
    if not used.any() or (used & ~batch.valid).any():
        raise MoejaxError("start_wt is zero everywhere, or not zero at padding: there is nothing to start from.")
    columns = np.flatnonzero(used.any(0))
    places = np.minimum(batch.places[:, columns], batch.width - 1)
    dtype = run.lm.decoder.accumulation_dtype
    seeds = StartWeights(jnp.asarray(places, jnp.int32), jnp.asarray(weights[:, columns], dtype))
    out = _read(run, seeds, engine_nodes(run.lm.config.num_layers))
    found = _step(run, out, 0, np.ones(len(batch.ids)), batch.ids.shape[1])
    found.nodes[HEAD][:] = weights
    assert out.logits is not None
    return found, out.logits[:, -1]


def _positions(batch: Batch, prompt: int, steps: list[int]) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """Where, in rows aligned at their ends, each step's token is predicted, and whether the row gets so far."""
    before = batch.valid[:, :prompt].sum(1)[:, None]
    generated = batch.lengths[:, None] - before
    # the last token's own column is not part of the batch
    live = np.array(steps) <= generated
    offsets = batch.width - batch.lengths[:, None]
    return np.minimum(offsets + before - 1 + np.array(steps), batch.width - 1), live


def _last(batch: Batch, column: int) -> Int[np.ndarray, " B"]:
    """The last column of each row, up to ``column``, that holds a token."""
    seen = batch.valid[:, : column + 1]
    return column - np.argmax(seen[:, ::-1], axis=1)


def _read(run: Run, seeds: LogitSeeds | StartWeights, nodes: tuple[str, ...]) -> Readout:
    lm = run.lm
    tokens, valid = run.batch.left(lm.config.pad_id)
    out = relevance(lm.flat, tokens, valid, seeds, Gates(), rule=run.rule, nodes=nodes)
    assert out.logits is not None
    # of the last start alone, if anybody asks
    return jax.device_get(replace(out, logits=out.logits[:, -1:]))


def _step(run: Run, out: Readout, n: int, factor: np.ndarray, columns: int) -> StepRelevance:
    """Start ``n`` of a readout, times ``factor`` (one for each row), in the first ``columns`` columns as given."""
    batch, config = run.batch, run.lm.config

    def scaled(x: np.ndarray) -> np.ndarray:
        factors = factor.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
        return (batch.in_columns(x, columns) * factors).astype(np.float32, copy=False)

    mine = {name: vector[n] for name, vector in out.vectors.items()}
    found = {name: scaled(x) for name, x in from_engine(mine, config.num_layers).items()}
    found[HEAD] = np.zeros((*batch.ids[:, :columns].shape, config.vocab_size), np.float32)
    nodes = {name: found[name] for name in stack(config.num_layers)}
    experts = {key: scaled(x) for key, x in _experts(run, out, n).items()}
    single = len(batch.ids) == 1
    return StepRelevance(nodes, {key: x[0] if single else x for key, x in experts.items()}, _ledger(out, n, factor))


def _experts(run: Run, out: Readout, n: int) -> dict[str, Float[np.ndarray, "B W E"]]:
    config, found = run.lm.config, {}
    kinds = {
        False: (out.gates.slots, out.routes, config.num_experts),
        True: (out.gates.attention_slots, out.attention_routes, config.num_attention_experts),
    }
    for key, (layer, attention) in expert_keys(config).items():
        slots, routes, count = kinds[attention]
        assert slots is not None
        assert routes is not None
        # rows of the batch in place of layers
        mine = ExpertRelevance(np.asarray(slots[n : n + 1, layer]), routes.ids[layer], routes.weights[layer], count)
        found[key] = mine.by_token()[0]
    return found


def _ledger(out: Readout, n: int, factor: np.ndarray) -> Ledger:
    tokens = out.gates.tokens
    assert tokens is not None
    wide = factor.astype(np.float64)
    return Ledger(
        target=out.target[:, n].astype(np.float64) * wide,
        tokens=np.asarray(tokens[n, 0]).sum(-1, dtype=np.float64) * wide,
        leaks={name: leak[n].T.astype(np.float64) * wide[:, None] for name, leak in out.leaks.items() if leak[n].any()},
    )
