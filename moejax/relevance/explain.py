"""``explain``: one forward pass, one vector-Jacobian product per target, read at the gates."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.lm import LM, Prompt, left_pad
from moejax.models import Decoder, Packed, unpack
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, ExpertRelevance, Relevance
from moejax.relevance.targets import BEST, Aim, Argmax, Target
from moejax.routing import Routing
from moejax.rules import Gates, Reading, Rule, by_name

_CANDIDATES = 5


class Seeds(NamedTuple):
    """N targets for each of B sequences: the sum over J of sign times logit of ``ids`` (:data:`BEST`: the largest)."""

    positions: Int[Array, "B N"]
    ids: Int[Array, "B N J"]
    signs: Float[Array, "B N J"]


class Slots(NamedTuple):
    """The routed slots of all layers; a layer without a mixture has id -1 and weight 0."""

    ids: Int[Any, "L B T K"]
    weights: Float[Any, "L B T K"]


class Readout(NamedTuple):
    """All that one call reads, on the device or, once fetched, on the host.

    ``ids`` are the seeds' with the best token filled in.
    """

    gates: Gates
    leaks: dict[str, Float[Any, "N L+1 B"]]
    target: Float[Any, "B N"]
    ids: Int[Any, "B N J"]
    logits: Float[Any, "B N V"]
    routes: Slots | None
    attention_routes: Slots | None


@partial(jax.jit, static_argnames=("rule", "chunk"))
def relevance(
    weights: Decoder | Packed,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    seeds: Seeds,
    knobs: Gates,
    *,
    rule: Rule,
    chunk: int | None = None,
) -> Readout:
    """Relevance at every gate for all seeds, in one forward pass and one backward pass over a batch of seeds.

    Args:
        knobs: interventions that hold during the pass.
        chunk: how many seeds to propagate at a time; all by default.
    """
    decoder = unpack(weights)
    dtype = jnp.promote_types(decoder.embedding.dtype, jnp.float32)
    probes = {name: jnp.zeros((decoder.config.num_layers + 1, len(tokens)), dtype) for name in sorted(rule.leaks)}
    readout = jax.tree.map(lambda g: g.astype(dtype), Gates.readout(decoder.config, tokens))

    def targets(gates: Gates, probes: dict[str, Array]) -> tuple[Array, tuple]:
        reading = Reading(rule, gates.over(knobs), probes)
        hidden = decoder.hidden(tokens, valid=valid, reading=reading)
        stream = jnp.take_along_axis(hidden.stream, seeds.positions[..., None], axis=1)
        logits = stop_gradient(decoder.logits(stream))
        ids = jnp.where(seeds.ids == BEST, jnp.argmax(logits, axis=-1, keepdims=True), seeds.ids)
        # only the head's rows that a seed names take part in the backward pass
        normed = decoder.norm(stream, reading.at(-1))
        rows = reading.linear(_rows, normed, decoder.output_embedding[ids])
        return (rows * seeds.signs).sum(-1), (ids, logits, hidden.routing)

    target, pull, (ids, logits, routing) = jax.vjp(targets, readout, probes, has_aux=True)
    seed_count = target.shape[1]
    one_hot = jnp.broadcast_to(jnp.eye(seed_count, dtype=target.dtype)[:, None], (seed_count, *target.shape))
    gates, leaks = jax.vmap(pull)(one_hot) if chunk is None else jax.lax.map(pull, one_hot, batch_size=chunk)
    feed_forward = _stack([r.feed_forward for r in routing])
    attention = _stack([r.attention for r in routing])
    return Readout(gates, leaks, target, ids, logits, feed_forward, attention)


def _stack(routing: list[Routing | None]) -> Slots | None:
    present = next((r for r in routing if r is not None), None)
    if present is None:
        return None
    none = Slots(jnp.full_like(present.ids, -1), jnp.zeros_like(present.weights))
    layers = [none if r is None else Slots(r.ids, r.weights) for r in routing]
    return Slots(*map(jnp.stack, zip(*layers, strict=True)))


def _rows(x: Float[Array, "B N D"], weight: Float[Array, "B N J D"]) -> Float[Array, "B N J"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bnd,bnjd->bnj", x, weight, preferred_element_type=wide)


def explain(
    lm: LM,
    prompt: Prompt,
    *,
    target: Target = Argmax(),
    rule: Rule | str = "attnlrp",
    gates: Gates | None = None,
    chunk: int | None = None,
) -> Relevance:
    """Which tokens, experts, heads and layers caused an output.

    Args:
        prompt: text or token ids.
        target: what to explain; by default the logit of the most likely next token.
        rule: how relevance propagates, or the name of a rule in ``moejax.rules.RULES``.
        gates: interventions that hold during the pass.
        chunk: how many targets to propagate at a time, to bound memory; all by default.

    Raises:
        PromptError: an empty prompt, an id out of range, a named token that is several tokens.
    """
    return explain_batch(lm, [prompt], target=target, rule=rule, gates=gates, chunk=chunk)[0]


def explain_batch(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    target: Target = Argmax(),
    rule: Rule | str = "attnlrp",
    gates: Gates | None = None,
    chunk: int | None = None,
) -> list[Relevance]:
    """:func:`explain` for several prompts as one padded batch; ``gates`` must broadcast over it."""
    if not prompts:
        return []
    rule = by_name(rule)
    resolved = [target.resolve(lm, lm.encode(p)) for p in prompts]
    tokens, valid = left_pad([np.array(ids, np.int32) for ids, _ in resolved], lm.config.pad_id)
    offsets = [tokens.shape[1] - len(ids) for ids, _ in resolved]
    seeds = _seeds([aims for _, aims in resolved], offsets, decoder_dtype(lm))
    out = relevance(lm.packed, tokens, valid, seeds, gates or Gates(), rule=rule, chunk=chunk)
    out = jax.tree.map(np.asarray, out)
    return [
        _result(lm, repr(rule), ids, aims, out, row, offset)
        for row, ((ids, aims), offset) in enumerate(zip(resolved, offsets, strict=True))
    ]


def decoder_dtype(lm: LM) -> jnp.dtype:
    """The dtype that logits of ``lm`` are computed in: float32 or wider."""
    return jnp.promote_types(lm.decoder.embedding.dtype, jnp.float32)


def _seeds(rows: list[list[Aim]], offsets: list[int], dtype: DTypeLike) -> Seeds:
    """Aims as arrays; rows with fewer aims repeat their last one, terms are filled up with sign zero."""
    count, terms = max(map(len, rows)), max(len(aim.terms) for aims in rows for aim in aims)
    positions = np.zeros((len(rows), count), np.int32)
    ids, signs = np.zeros((2, len(rows), count, terms))
    for row, (aims, offset) in enumerate(zip(rows, offsets, strict=True)):
        for n in range(count):
            aim = aims[min(n, len(aims) - 1)]
            positions[row, n] = aim.position + offset
            for j, (token, sign) in enumerate(aim.terms):
                ids[row, n, j], signs[row, n, j] = token, sign
    return Seeds(jnp.asarray(positions), jnp.asarray(ids, jnp.int32), jnp.asarray(signs, dtype))


def _result(lm: LM, rule: str, token_ids: list[int], aims: list[Aim], out: Readout, row: int, offset: int) -> Relevance:
    """One batch row of the readout, without its padding."""
    n = len(aims)
    gates = {f.name: g[:n, :, row, offset:] for f in fields(Gates) if (g := getattr(out.gates, f.name)) is not None}
    leaks = {name: leak[:n, :, row].astype(np.float64) for name, leak in out.leaks.items()}
    layers = gates["tokens"]

    def experts(name: str, slots: Slots | None, count: int) -> ExpertRelevance | None:
        if slots is None:
            return None
        return ExpertRelevance(gates[name], slots.ids[:, row, offset:], slots.weights[:, row, offset:], count)

    return Relevance(
        model=lm.name,
        rule=rule,
        prompt=lm.tokenizer.decode(token_ids) if lm.tokenizer else " ".join(map(str, token_ids)),
        token_ids=np.array(token_ids),
        pieces=lm.pieces(token_ids),
        labels=[_label(lm, aim, out.ids[row, i]) for i, aim in enumerate(aims)],
        positions=np.array([aim.position for aim in aims]),
        layers=layers,
        heads=gates["heads"],
        feed_forward=experts("slots", out.routes, lm.config.num_experts),
        attention=experts("attention_slots", out.attention_routes, lm.config.num_attention_experts),
        shared=gates.get("shared"),
        ledger=Ledger(
            target=out.target[row, :n].astype(np.float64),
            tokens=layers[:, 0].sum(-1, dtype=np.float64),
            # an operation that the model does not have leaks exactly nothing
            leaks={name: leak for name, leak in leaks.items() if leak.any()},
        ),
        candidates=[_candidates(lm, logits) for logits in out.logits[row, :n]],
    )


def _label(lm: LM, aim: Aim, ids: np.ndarray) -> str:
    pieces = lm.pieces(ids[: len(aim.terms)].tolist())
    return " ".join(f"{'-' if sign < 0 else '+'} {p!r}" for p, (_, sign) in zip(pieces, aim.terms, strict=True))[2:]


def _candidates(lm: LM, logits: np.ndarray) -> list[Candidate]:
    ids = np.argsort(-logits)[:_CANDIDATES].tolist()
    shifted = np.exp(logits - logits.max())
    probability = shifted / shifted.sum()
    pieces = lm.pieces(ids)
    return [Candidate(p, i, float(logits[i]), float(probability[i])) for p, i in zip(pieces, ids, strict=True)]
