"""``explain``: what caused an output, as a user asks it."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError, PromptError
from moejax.lm import LM, Prompt, padded_length, right_pad
from moejax.relevance.budget import Footprint
from moejax.relevance.engine import Readout, Slots, checked_chunk, node_shape, per_device, relevance
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, ExpertRelevance, Relevance
from moejax.relevance.targets import Argmax, Target, TargetTerms, checked_target
from moejax.rules import Gates, Rule, by_name

_CANDIDATES = 5


def explain(
    lm: LM,
    prompt: Prompt,
    *,
    target: Target = Argmax(),
    rule: Rule | str = "attnlrp",
    gates: Gates | None = None,
    nodes: Sequence[str] = (),
    chunk: int | None = None,
    rematerialise: bool | int | None = None,
    max_bytes: int | None = None,
) -> Relevance:
    """Which tokens, experts, heads and layers caused an output.

    Args:
        prompt: text or token ids; the rest as in :func:`explain_batch`.

    Raises:
        PromptError: an empty prompt, an id out of range, a named token that is several tokens, no such node.
        MoejaxError: an unknown rule, gates of another model, weights in float16.
    """
    options = {"target": target, "rule": rule, "gates": gates, "nodes": nodes}
    bounds = {"chunk": chunk, "rematerialise": rematerialise, "max_bytes": max_bytes}
    return explain_batch(lm, [prompt], **options, **bounds)[0]


def explain_batch(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    target: Target = Argmax(),
    rule: Rule | str = "attnlrp",
    gates: Gates | None = None,
    nodes: Sequence[str] = (),
    chunk: int | None = None,
    rematerialise: bool | int | None = None,
    max_bytes: int | None = None,
) -> list[Relevance]:
    """:func:`explain` for several prompts as one batch, padded behind their ends, where no token sees it; one by one,
    where gates must fit each, if a layer lets sequences compete.

    Prompts are padded to one of few lengths, so that most find their program compiled (:func:`moejax.lm.bucket_length`),
    unless ``gates`` hold for single tokens or ``max_bytes`` is given.

    Args:
        target: what to explain; by default the logit of the most likely next token.
        rule: how relevance propagates, or the name of a rule in ``moejax.rules.RULES``.
        gates: interventions that hold during the pass; they must broadcast over the batch. Tokens are counted from a
            prompt's beginning.
        nodes: where to read the relevance of every number, as ``"feed_forward.3"`` or ``"neurons.0"``; the names are
            those of ``moejax.relevance.NODES``, with the layer. Read them from ``vectors`` of the result.
        chunk: how many targets a device propagates at a time, to bound memory; all by default.
        rematerialise: of how many layers, counted from the first, to keep only the stream that enters them and compute
            the rest again on the way back; ``True`` for all. Less memory for long prompts, up to 40 % more time (OLMoE,
            4096 tokens), the same numbers. By default of none, unless ``max_bytes`` asks for it.
        max_bytes: what the pass may take of a device beside the weights, by an estimate: ``chunk`` and
            ``rematerialise``, where they are not given, are chosen to stay below it in the least time.

    Raises:
        PromptError: an empty prompt, an id out of range, a named token that is several tokens, no such node.
        MoejaxError: an unknown rule, gates of another model, weights in float16, ``max_bytes`` too little for a target,
            fewer than no layers, a chunk of none.
    """
    if len(prompts) == 0:
        return []
    if isinstance(prompts, str):
        raise PromptError("one text is no list of prompts; put it in one, or call explain.")
    rule, chunk, target = by_name(rule), checked_chunk(chunk), checked_target(target)
    read = partial(_together, lm, target, rule, gates, tuple(nodes), chunk, rematerialise, max_bytes)
    if lm.config.couples_sequences:
        return [found for prompt in prompts for found in read([prompt])]
    return read(prompts)


def _together(
    lm: LM,
    target: Target,
    rule: Rule,
    gates: Gates | None,
    nodes: tuple[str, ...],
    chunk: int | None,
    rematerialise: bool | int | None,
    max_bytes: int | None,
    prompts: Sequence[Prompt],
) -> list[Relevance]:
    resolved = [target.resolve(lm, lm.encode(p)) for p in prompts]
    rows = [ids for ids, _ in resolved]
    longest = max(map(len, rows))
    interventions = Gates() if gates is None else gates.check(lm.config, np.zeros((len(rows), longest), np.int32))
    # who bounds memory has none for padding
    width = padded_length(lm.config, longest, gates) if max_bytes is None else longest
    tokens = right_pad(rows, width, lm.config.pad_id)
    seeds = target.seeds([aims for _, aims in resolved], decoder_dtype(lm))
    again = _layers(rematerialise, lm.config.num_layers)
    if max_bytes is not None:
        count = 1 if target.joint else max(len(aims) for _, aims in resolved)
        mine, count = per_device(lm.config, len(tokens), count)
        chunk, again = _footprint(lm, tokens[:mine], nodes).arrange(count, max_bytes, chunk, again)
    out = relevance(
        lm.flat,
        tokens,
        None,
        seeds,
        interventions,
        rule=rule,
        chunk=chunk,
        nodes=nodes,
        joint=target.joint,
        rematerialised_layers=again or 0,
    )
    out, likely = jax.device_get((out._replace(logits=None), _likely(out.logits)))
    return [
        _result(lm, repr(rule), target, ids, aims, out.cut(len(ids)), likely, row)
        for row, (ids, aims) in enumerate(resolved)
    ]


def decoder_dtype(lm: LM) -> jnp.dtype:
    """The dtype that logits of ``lm`` are computed in: float32 or wider."""
    return jnp.promote_types(lm.decoder.embedding.dtype, jnp.float32)


def _layers(rematerialise: bool | int | None, layers: int) -> int | None:
    """How many layers are meant, of so many."""
    if rematerialise is None:
        return None
    if isinstance(rematerialise, bool):
        return layers if rematerialise else 0
    if rematerialise < 0:
        raise MoejaxError(f"rematerialise={rematerialise}: a number of layers, or True for all.")
    return min(rematerialise, layers)


def _footprint(lm: LM, tokens: Array, nodes: tuple[str, ...]) -> Footprint:
    batch, length = tokens.shape
    found = Footprint.of(lm.config, batch, length, lm.decoder.embedding.dtype.itemsize)
    read = sum(math.prod(node_shape(lm.config, node, tokens.shape)) for node in nodes)
    return replace(found, readout=found.readout + 4 * read)


class _Likely(NamedTuple):
    """The most likely next tokens, the best first."""

    ids: Int[Any, "B N C"]
    logits: Float[Any, "B N C"]
    probabilities: Float[Any, "B N C"]

    def of(self, lm: LM, row: int, target: int) -> list[Candidate]:
        """Those of one target, as people read them."""
        ids, logits, probabilities = (array[row, target].tolist() for array in self)
        return list(map(Candidate, lm.pieces(ids), ids, logits, probabilities))


@jax.jit
def _likely(logits: Float[Array, "B N V"]) -> _Likely:
    """Found where the logits are: whole vocabularies take long to fetch and to sort."""
    best, ids = jax.lax.top_k(logits, min(_CANDIDATES, logits.shape[-1]))
    return _Likely(ids, best, jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)))


def _result(
    lm: LM,
    rule: str,
    target: Target,
    token_ids: list[int],
    aims: list[TargetTerms],
    out: Readout,
    likely: _Likely,
    row: int,
) -> Relevance:
    """One batch row of the readout."""
    n, values = len(aims), out.target[row, : len(aims)].astype(np.float64)
    labels = [target.label(lm, aim, out.ids[row, i]) for i, aim in enumerate(aims)]
    if target.joint:
        n, values, labels = 1, values.sum(keepdims=True), [" + ".join(labels)]
    gates = {f.name: g[:n, :, row] for f in fields(Gates) if (g := getattr(out.gates, f.name)) is not None}
    leaks = {name: leak[:n, :, row].astype(np.float64) for name, leak in out.leaks.items()}
    layers = gates["tokens"]

    def experts(name: str, slots: Slots | None, count: int) -> ExpertRelevance | None:
        if slots is None:
            return None
        ids, weights = slots.ids[:, row], slots.weights[:, row]
        return ExpertRelevance(gates[name], ids, weights, count)

    return Relevance(
        model=lm.name,
        rule=rule,
        prompt=lm.tokenizer.decode(token_ids) if lm.tokenizer else " ".join(map(str, token_ids)),
        token_ids=np.array(token_ids),
        pieces=lm.pieces(token_ids),
        labels=labels,
        positions=np.array([aim.position for aim in aims[-n:]]),
        layers=layers,
        heads=gates["heads"],
        feed_forward=experts("slots", out.routes, lm.config.num_experts),
        attention=experts("attention_slots", out.attention_routes, lm.config.num_attention_experts),
        shared=gates.get("shared"),
        vectors={node: vector[:n, row] for node, vector in out.vectors.items()},
        ledger=Ledger(
            target=values,
            tokens=layers[:, 0].sum(-1, dtype=np.float64),
            # an operation that the model does not have leaks exactly nothing
            leaks={name: leak for name, leak in leaks.items() if leak.any()},
        ),
        candidates=[likely.of(lm, row, n) for n in range(len(aims) - n, len(aims))],
    )
