"""Relevance of one or many starts from one forward pass, in the columns and by the nodes of DLBacktrace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from moejax.dlbacktrace.inputs import EncodedInputs
from moejax.dlbacktrace.nodes import HEAD, engine_nodes, expert_keys, from_engine, node_of, stack
from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.models import Decoder, Hidden
from moejax.relevance.engine import Readout, relevance
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.ledger import Ledger
from moejax.relevance.seeds import LogitSeeds, TargetValues
from moejax.rules import Gates, Reading, Rule

CHUNK_BYTES = 2**30
"""Memory in bytes for the vectors of the steps that are propagated together."""


@dataclass(frozen=True)
class StepRelevance:
    """Relevance of one step.

    Attributes:
        nodes: relevance of every number at every node, ``[B T D]``, at the head ``[B T V]``.
        experts: relevance of each expert for each token by mixture, ``[T E]``, with several rows ``[B T E]``.
        ledger: where the relevance of each row came from and where it went; a target for each row.
    """

    nodes: dict[str, Float[np.ndarray, "B T _"]]
    experts: dict[str, Float[np.ndarray, "*b T E"]]
    ledger: Ledger

    def rescaled(self, total: float | int, largest: float | int) -> "StepRelevance":
        """The relevance with each node, and its experts with it, multiplied by one number.

        A node is first scaled to sum to ``total``, then down to absolute values of at most ``largest``. Zero leaves the
        sum, or the size, unchanged. A node whose sum is zero keeps it.
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


class LogitRelevanceSeeds(NamedTuple):
    """Seeds of one target: given relevance of the logits at ``J`` positions of each row."""

    positions: Int[Array, "B J"]
    relevance: Float[Array, "B J V"]
    num_targets = 1

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        """The target, whose gradient by each logit is relevance / logit, and the logits at the last position."""
        last = reading.for_layer(-1)
        stream = jnp.take_along_axis(hidden.stream, self.positions[..., None], axis=1)
        logits = decoder.head_product(decoder.norm(stream, last), last)
        # relevance is value times cotangent, so a logit of zero cannot have any
        value = stop_gradient(logits)
        cotangent = jnp.where(value == 0, 0, self.relevance / jnp.where(value == 0, 1, value))
        target = (logits * cotangent).sum((1, 2))[:, None]
        return TargetValues(target, jnp.zeros((*target.shape, 0), jnp.int32), value[:, -1:])


class PropagationRun(NamedTuple):
    """What is explained.

    Attributes:
        lm: the model.
        rule: the rule that propagates relevance.
        inputs: all tokens that the model reads, generated ones included.
        prompt: number of columns of the prompts; the columns behind them were generated.
    """

    lm: LM
    rule: Rule
    inputs: EncodedInputs
    prompt: int


def relevance_of_tokens(
    run: PropagationRun, tokens: Int[np.ndarray, "B A"], steps: Sequence[int], multiplier: float | int
) -> Iterator[tuple[int, StepRelevance]]:
    """Yield each of ``steps`` with the relevance of the logit of its token, over the columns before the token.

    A row that ended before a step has no relevance. As many steps as fit into :data:`CHUNK_BYTES` share a backward
    pass.

    Args:
        tokens: the generated tokens.
        multiplier: relevance of each step's logit.
    """
    inputs = run.inputs
    nodes = engine_nodes(run.lm.config.num_layers)
    bytes_per_step = len(inputs.ids) * inputs.width * run.lm.config.model_dim * 4 * len(nodes)
    chunk = max(1, min(len(steps), CHUNK_BYTES // bytes_per_step))
    for first in range(0, len(steps), chunk):
        current = list(steps[first : first + chunk])
        # the last chunk is filled up, so that it needs no program of its own
        padded = current + current[-1:] * (chunk - len(current))
        seeds, chosen = _token_seeds(run, tokens, padded)
        out = _propagate(run, seeds, nodes)
        for n, step in enumerate(current):
            columns = run.prompt + step
            value = out.target[:, n].astype(np.float64)
            factor = np.where(value == 0, 0, multiplier / np.where(value == 0, 1, value))
            result = _step_relevance(run, out, n, factor, columns)
            last = inputs.last_columns(columns)
            result.nodes[HEAD][np.arange(len(value)), last, chosen[:, n]] = np.where(value == 0, 0, multiplier)
            yield step, result


def relevance_of_logits(
    run: PropagationRun, initial: Float[np.ndarray, "B T V"]
) -> tuple[StepRelevance, Float[np.ndarray, "B V"]]:
    """The relevance that given relevance at the logits propagates to, and the logits at the last column that has any.

    Raises:
        MoejaxError: initial relevance of another shape, zero everywhere, or not zero at padding.
    """
    inputs = run.inputs
    expected = (*inputs.ids.shape, run.lm.config.vocab_size)
    if initial.shape != expected:
        raise MoejaxError(f"start_wt has shape {list(initial.shape)}; the logits it stands for have {list(expected)}.")
    used = initial.any(2)
    if not used.any() or (used & ~inputs.valid).any():
        raise MoejaxError("start_wt is zero everywhere, or not zero at padding: there is nothing to start from.")
    columns = np.flatnonzero(used.any(0))
    positions = np.minimum(inputs.positions[:, columns], inputs.width - 1)
    dtype = run.lm.decoder.accumulation_dtype
    seeds = LogitRelevanceSeeds(jnp.asarray(positions, jnp.int32), jnp.asarray(initial[:, columns], dtype))
    out = _propagate(run, seeds, engine_nodes(run.lm.config.num_layers))
    result = _step_relevance(run, out, 0, np.ones(len(inputs.ids)), inputs.ids.shape[1])
    result.nodes[HEAD][:] = initial
    assert out.logits is not None
    return result, out.logits[:, -1]


def _token_seeds(
    run: PropagationRun, tokens: Int[np.ndarray, "B A"], steps: list[int]
) -> tuple[LogitSeeds, Int[np.ndarray, "B N"]]:
    """Seeds for the logits of the tokens of ``steps``, one target a step, and the token ids, 0 where a row has ended.

    This and the padding in :func:`_propagate` are the steps from a prompt and its targets to arrays that
    :func:`moejax.explain` takes too; here rows are padded on the left.
    """
    positions, live = _positions(run.inputs, run.prompt, steps)
    chosen = np.where(live, tokens[:, steps], 0)
    seeds = LogitSeeds.of(
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(chosen[..., None], jnp.int32),
        jnp.asarray(live[..., None], run.lm.decoder.accumulation_dtype),
    )
    return seeds, chosen


def _positions(
    inputs: EncodedInputs, prompt: int, steps: list[int]
) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """The position in left-padded rows that predicts each step's token, and whether the row has that step."""
    prompt_lengths = inputs.valid[:, :prompt].sum(1)[:, None]
    generated = inputs.lengths[:, None] - prompt_lengths
    # the last token has no column: it was chosen, but not read
    live = np.array(steps) <= generated
    offsets = inputs.width - inputs.lengths[:, None]
    return np.minimum(offsets + prompt_lengths - 1 + np.array(steps), inputs.width - 1), live


def _propagate(run: PropagationRun, seeds: LogitSeeds | LogitRelevanceSeeds, nodes: tuple[str, ...]) -> Readout:
    """The engine's readout on the host, with the logits of the last target only."""
    lm = run.lm
    tokens, valid = run.inputs.left(lm.config.pad_id)
    out = relevance(lm.flat, tokens, valid, seeds, Gates(), rule=run.rule, nodes=nodes)
    assert out.logits is not None
    # only the logits of the last target are ever read
    return jax.device_get(replace(out, logits=out.logits[:, -1:]))


def _step_relevance(run: PropagationRun, out: Readout, n: int, factor: np.ndarray, columns: int) -> StepRelevance:
    """Target ``n`` of a readout times ``factor`` (a number for each row), in the first ``columns`` columns as given."""
    inputs, config = run.inputs, run.lm.config

    def scaled(x: np.ndarray) -> np.ndarray:
        factors = factor.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
        return (inputs.in_columns(x, columns) * factors).astype(np.float32, copy=False)

    vectors = from_engine({name: vector[n] for name, vector in out.vectors.items()}, config.num_layers)
    by_name = {name: scaled(x) for name, x in vectors.items()}
    by_name[HEAD] = np.zeros((*inputs.ids[:, :columns].shape, config.vocab_size), np.float32)
    nodes = {name: by_name[name] for name in stack(config.num_layers)}
    experts = {key: scaled(x) for key, x in _experts(run, out, n).items()}
    if len(inputs.ids) == 1:
        experts = {key: x[0] for key, x in experts.items()}
    return StepRelevance(nodes, experts, _ledger(out, n, factor))


def _experts(run: PropagationRun, out: Readout, n: int) -> dict[str, Float[np.ndarray, "B W E"]]:
    """Relevance of each mixture's experts for target ``n``, by the names of DLBacktrace."""
    config, experts = run.lm.config, {}
    kinds = {
        False: (out.gates.slots, out.routes, config.num_experts),
        True: (out.gates.attention_slots, out.attention_routes, config.num_attention_experts),
    }
    for key, (layer, attention) in expert_keys(config).items():
        slots, routes, count = kinds[attention]
        assert slots is not None
        assert routes is not None
        # the rows of the batch take the place of the layers
        relevance_of_slots = np.asarray(slots[n : n + 1, layer])
        mixture = ExpertRelevance(relevance_of_slots, routes.ids[layer], routes.weights[layer], count)
        experts[key] = mixture.by_token()[0]
    return experts


def _ledger(out: Readout, n: int, factor: np.ndarray) -> Ledger:
    tokens = out.gates.tokens
    assert tokens is not None
    factors = factor.astype(np.float64)
    return Ledger(
        target=out.target[:, n].astype(np.float64) * factors,
        tokens=np.asarray(tokens[n, 0]).sum(-1, dtype=np.float64) * factors,
        leaks={
            name: leak[n].T.astype(np.float64) * factors[:, None] for name, leak in out.leaks.items() if leak[n].any()
        },
    )
