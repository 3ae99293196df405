"""``explain``: which tokens, experts, heads and layers caused an output."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError, PromptError
from moejax.lm import LM, Prompt
from moejax.models.finite import first_not_finite
from moejax.models.node_table import checked_edits, from_first_token
from moejax.ops.memory import free_bytes
from moejax.processes import to_host
from moejax.relevance.budget import Footprint
from moejax.relevance.engine import Readout, Slots, checked_chunk, explained_shape, per_device, relevance
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.ledger import Ledger
from moejax.relevance.question import ResolvedTarget
from moejax.relevance.result import Candidate, Relevance
from moejax.relevance.targets import Argmax, Target, TargetLike, checked_target
from moejax.rules import Edits, Gates, Rule, by_name
from moejax.rules.edits import Edit

_CANDIDATES = 5
"""Number of likely next tokens that a result lists."""


@dataclass(frozen=True)
class PassOptions:
    """The options of :func:`explain` that concern the pass itself, checked."""

    rule: Rule
    gates: Gates | None
    edits: Edits | None
    nodes: tuple[str, ...]
    chunk: int | None
    rematerialise: bool | int | None
    max_bytes: int | str | None

    def __post_init__(self) -> None:
        if isinstance(self.max_bytes, str) and self.max_bytes != "auto":
            raise MoejaxError(f"max_bytes={self.max_bytes!r}: a number of bytes, 'auto', or None for no bound.")

    def rematerialised_layers(self, layers: int) -> int | None:
        """Return how many of ``layers`` layers to compute again; ``None`` if ``max_bytes`` decides.

        Raises:
            MoejaxError: a negative number is given.
        """
        if self.rematerialise is None:
            return None
        if isinstance(self.rematerialise, bool):
            return layers if self.rematerialise else 0
        if self.rematerialise < 0:
            raise MoejaxError(f"rematerialise={self.rematerialise}: a number of layers, or True for all.")
        return min(self.rematerialise, layers)


def explain(
    lm: LM,
    prompt: Prompt,
    *,
    target: TargetLike = Argmax(),
    rule: Rule | str = "attnlrp",
    gates: Gates | None = None,
    edits: Edits | None = None,
    nodes: Sequence[str] = (),
    chunk: int | None = None,
    rematerialise: bool | int | None = None,
    max_bytes: int | str | None = "auto",
) -> Relevance:
    """Compute which tokens, experts, heads and layers caused an output.

    Args:
        prompt: text or token ids. The other arguments are as in :func:`explain_batch`.

    Raises:
        PromptError: an empty prompt, an id out of range, a named token that is several tokens, no such node.
        MoejaxError: an unknown rule, gates or edits of another model, weights in float16, values that are not finite.
    """
    options = PassOptions(by_name(rule), gates, edits, tuple(nodes), checked_chunk(chunk), rematerialise, max_bytes)
    return _explain(lm, [prompt], checked_target(target), options)[0]


def explain_batch(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    target: TargetLike = Argmax(),
    rule: Rule | str = "attnlrp",
    gates: Gates | None = None,
    edits: Edits | None = None,
    nodes: Sequence[str] = (),
    chunk: int | None = None,
    rematerialise: bool | int | None = None,
    max_bytes: int | str | None = "auto",
) -> list[Relevance]:
    """Compute :func:`explain` for several prompts in one batch.

    Prompts are padded at their ends, where no token attends to the padding, to one of few lengths, so that most prompts
    find their program compiled (:func:`moejax.models.padding.bucket_length`). They are not padded that far if ``gates``
    hold for single tokens or ``max_bytes`` is a number. If a layer couples sequences (``couples_sequences``), prompts
    run one at a time and ``gates`` must fit each of them.

    Args:
        target: what to explain, or a token's text or id; by default the logit of the most likely next token.
        rule: how relevance propagates: a rule, or the name of one in ``moejax.rules.RULES``.
        gates: interventions that hold during the pass; they must broadcast over the batch. Tokens are counted from a
            prompt's beginning.
        edits: changes of values at nodes that hold during the pass. What they add or set is no relevance of the tokens:
            the ledger has it under ``edits``, within routers under ``router``.
        nodes: where to read the relevance of every number: ``"feed_forward.3"`` or ``"neurons.0"``, a name in
            ``moejax.relevance.NODES`` and a layer. The result has it in ``vectors``.
        chunk: how many targets a device propagates at a time, to bound memory; by default all.
        rematerialise: number of leading layers whose activations are not kept but computed again in the backward pass;
            ``True`` for all. Long prompts need less memory then, and up to 40 % more time (OLMoE, 4096 tokens), for the
            same numbers. By default none, unless ``max_bytes`` asks for it.
        max_bytes: how much memory of a device the pass may take beside the weights, by an estimate. ``chunk`` and
            ``rematerialise``, where they are not given, are chosen to stay below it in the least time. By default what
            is free on the device, less a margin, or no bound where the device does not tell, as CPUs do not, and in
            several processes. ``None`` is no bound.

    Raises:
        PromptError: an empty prompt, an id out of range, a named token that is several tokens, no such node.
        MoejaxError: an unknown rule, gates or edits of another model, weights in float16, ``max_bytes`` too little for
            a target, a negative ``rematerialise``, a ``chunk`` that is not positive, values that are not finite.
    """
    if len(prompts) == 0:
        return []
    if isinstance(prompts, str):
        raise PromptError("one text is no list of prompts; put it in one, or call explain.")
    options = PassOptions(by_name(rule), gates, edits, tuple(nodes), checked_chunk(chunk), rematerialise, max_bytes)
    target = checked_target(target)
    if lm.config.couples_sequences:
        return [result for prompt in prompts for result in _explain(lm, [prompt], target, options)]
    return _explain(lm, prompts, target, options)


def _explain(lm: LM, prompts: Sequence[Prompt], target: Target, options: PassOptions) -> list[Relevance]:
    """Explain all prompts in one pass."""
    resolved = ResolvedTarget.of(lm, prompts, target)
    interventions = resolved.interventions(options.gates)
    # padding would take memory, which max_bytes bounds
    tokens = resolved.tokens(options.gates, bucket=not isinstance(options.max_bytes, int))
    bound_is_known = not isinstance(options.max_bytes, str)
    max_bytes = options.max_bytes if not isinstance(options.max_bytes, str) else _free_bytes(lm)
    chunk, layers = options.chunk, options.rematerialised_layers(lm.config.num_layers)
    if max_bytes is not None:
        sequences, seeds = per_device(lm.config, len(tokens), resolved.num_cotangents)
        footprint = _footprint(lm, tokens[:sequences], options.nodes)
        chunk, layers = footprint.arrange(seeds, max_bytes, chunk, layers, bound_is_known=bound_is_known)
    out = relevance(
        lm.flat,
        tokens,
        None,
        resolved.seeds,
        interventions,
        _edits(resolved, options.edits),
        rule=options.rule,
        chunk=chunk,
        nodes=options.nodes,
        joint=target.joint,
        rematerialised_layers=layers or 0,
    )
    out, likely = to_host((replace(out, logits=None), _likely(out.logits)))
    _check_finite(resolved, out, options)
    return [_result(resolved, row, repr(options.rule), out, likely) for row in range(len(prompts))]


def _check_finite(resolved: ResolvedTarget, out: Readout, options: PassOptions) -> None:
    """Look at what has come to the host: raise where nothing was explained, warn where some relevance is no number.

    Raises:
        MoejaxError: a target's value is not finite; the pass is run again to say where that begins.
    """
    lm = resolved.lm
    for row, ids in enumerate(resolved.sequences):
        if np.isfinite(out.target[row, : len(resolved.terms[row])]).all():
            continue
        alone = len(resolved.sequences) == 1
        changes = (options.gates, options.edits) if alone else (None, None)
        where = first_not_finite(lm.flat, np.array([ids]), None, *changes)
        raise MoejaxError(f"{lm.name}: the explained values are not finite; {where}.")
    layers = np.isfinite(np.asarray(out.cut(resolved.length).gates.tokens)).all((0, 2, 3))
    if not layers.all():
        warnings.warn(
            f"relevance is NaN or infinite from layer {np.flatnonzero(~layers)[-1]} down to the tokens, though the "
            "explained values are finite; relevance of higher layers is right. Try another rule or a wider dtype.",
            stacklevel=4,
        )


def _edits(resolved: ResolvedTarget, edits: Edits | None) -> Edits:
    """Return edits that fit the sequences, whose tokens count from the first, as data."""
    if edits is None:
        return Edits()
    checked = checked_edits(resolved.lm.config, edits, (len(resolved.sequences), resolved.length))
    if any(edit.node.startswith("edges.") for edit in checked.edits):
        raise MoejaxError("a pattern that is edited has no relevance: edit heads, or switch them off by gates.")
    if not resolved.lm.config.couples_sequences and any(_differs_by_token(edit) for edit in checked.edits):
        raise MoejaxError("an edit whose value differs by token names its tokens (tokens=) in explain.")
    return from_first_token(checked, [len(ids) for ids in resolved.sequences]).as_data()


def _differs_by_token(edit: Edit) -> bool:
    # sequences are padded behind their ends, where the value would be too short
    return "tokens" not in edit.where and edit.value.shape[1] > 1


def _free_bytes(lm: LM) -> int | None:
    """Return the free memory of the model's devices; ``None`` if it is not known, or processes might disagree on it."""
    embedding = lm.decoder.embedding
    if jax.process_count() > 1 or not isinstance(embedding, jax.Array):
        return None
    return free_bytes(embedding.devices())


def _footprint(lm: LM, tokens: Array, nodes: tuple[str, ...]) -> Footprint:
    """Estimate the memory of a pass that reads ``nodes`` too."""
    batch, length = tokens.shape
    footprint = Footprint.of(lm.config, batch, length, lm.decoder.embedding.dtype.itemsize)
    numbers = sum(math.prod(explained_shape(lm.config, node, tokens.shape)) for node in nodes)
    return replace(footprint, readout=footprint.readout + 4 * numbers)


class _Likely(NamedTuple):
    """The X most likely next tokens at each target, the best first."""

    ids: Int[Any, "B N X"]
    logits: Float[Any, "B N X"]
    probabilities: Float[Any, "B N X"]

    def candidates(self, lm: LM, row: int, target: int) -> list[Candidate]:
        """Return the tokens at one target, as people read them."""
        ids, logits, probabilities = (array[row, target].tolist() for array in self)
        return list(map(Candidate, lm.token_texts(ids), ids, logits, probabilities))


@jax.jit
def _likely(logits: Float[Array, "B N V"]) -> _Likely:
    """Select the most likely tokens on the device: whole vocabularies take long to fetch and to sort."""
    best, ids = jax.lax.top_k(logits, min(_CANDIDATES, logits.shape[-1]))
    return _Likely(ids, best, jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)))


def _result(resolved: ResolvedTarget, row: int, rule: str, out: Readout, likely: _Likely) -> Relevance:
    """Make the result of one sequence from the readout of the batch."""
    lm, ids, count = resolved.lm, resolved.sequences[row], len(resolved.terms[row])
    out, values = out.cut(len(ids)), out.target[row, :count].astype(np.float64)
    if resolved.target.joint:
        values = values.sum(keepdims=True)
    n = len(values)
    gates = {f.name: g[:n, :, row] for f in fields(Gates) if (g := getattr(out.gates, f.name)) is not None}
    leaks = {name: leak[:n, :, row].astype(np.float64) for name, leak in out.leaks.items()}
    layers = gates["tokens"]

    def experts(name: str, slots: Slots | None, count: int) -> ExpertRelevance | None:
        return None if slots is None else ExpertRelevance(gates[name], slots.ids[:, row], slots.weights[:, row], count)

    return Relevance(
        model=lm.name,
        rule=rule,
        prompt=lm.tokenizer.decode(ids) if lm.tokenizer else " ".join(map(str, ids)),
        token_ids=np.array(ids),
        pieces=lm.pieces(ids),
        # a target may also shorten the sequence
        roles=resolved.roles(row),
        prompt_length=min(resolved.prompt_lengths[row], len(ids)),
        labels=resolved.labels(row, out.ids[row]),
        positions=resolved.positions(row),
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
        candidates=[likely.candidates(lm, row, target) for target in range(count - n, count)],
    )
