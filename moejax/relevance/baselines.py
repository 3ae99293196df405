"""Scores of other methods, to compare relevance with, in the call form of ``explain``.

Most are read by the same gates: a method is a rule under which a gate's cotangent is the method's score.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError
from moejax.lm import LM, Prompt
from moejax.models import Decoder, FlatDecoder, unflatten
from moejax.ops.cotangents import gate
from moejax.program import Program
from moejax.relevance.ablate import Question, hidden_apart, read_as_first, spread
from moejax.relevance.engine import LogitSeeds, Readout, Seeds, Slots, checked_chunk, refuse_half, relevance
from moejax.relevance.explain import decoder_dtype, explain
from moejax.relevance.result import ExpertRelevance
from moejax.relevance.targets import Argmax, Target
from moejax.rules import Activations, Direct, Gates, Reading
from moejax.xla import refuse_wrong_sums


@dataclass(frozen=True)
class Scores:
    """What a method says of a prompt, for N targets; what it says nothing of is ``None``.

    Attributes:
        method, unit: its name, and what its numbers are.
        labels, positions, token_ids, pieces: as in :class:`Relevance`.
        tokens: of each input token.
        feed_forward, attention: of each routed slot; methods that score experts say the same of all their slots.
        heads: of each attention head's output for a token.
        shared: of the shared expert's output for a token.
        gap: the target's value, less that of the empty input, less all scores; ``None`` if they need not add up.
    """

    method: str
    unit: str
    labels: list[str]
    positions: Int[np.ndarray, " N"]
    token_ids: Int[np.ndarray, " T"]
    pieces: list[str]
    tokens: Float[np.ndarray, "N T"] | None = None
    feed_forward: ExpertRelevance | None = None
    attention: ExpertRelevance | None = None
    heads: Float[np.ndarray, "N L T H"] | None = None
    shared: Float[np.ndarray, "N L T 1"] | None = None
    gap: Float[np.ndarray, " N"] | None = None

    @property
    def experts(self) -> Float[np.ndarray, "N L T K"]:
        """Score of each routed slot of the feed-forward layers."""
        return self._mixture.slots

    @property
    def expert_ids(self) -> Int[np.ndarray, "L T K"]:
        """The expert of each routed slot; -1 in layers without experts."""
        return self._mixture.ids

    def by_expert(self, how: str = "sum") -> Float[np.ndarray, "N L E"]:
        """Score of each expert over the tokens routed to it (:meth:`ExpertRelevance.by_expert`)."""
        return self._mixture.by_expert(how)

    @property
    def _mixture(self) -> ExpertRelevance:
        if self.feed_forward is None:
            raise AttributeError(f"{self.method} has no scores of experts of this model.")
        return self.feed_forward


class Baseline(Protocol):
    """A method in the call form of ``explain``."""

    def __call__(self, lm: LM, prompt: Prompt, *, target: Target = ...) -> Scores: ...


# ---- along a path -------------------------------------------------------------------------------------------------


def integrated_gradients(
    lm: LM,
    prompt: Prompt,
    *,
    target: Target = Argmax(),
    steps: int = 20,
    over: str = "embeddings",
    baseline: Any = None,
    chunk: int | None = None,
) -> Scores:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365, eq. 1), by the midpoint rule; a target's units.

    ``gap`` is what the steps miss of completeness; over experts, also what belongs to experts that run on the way but
    not in the intact pass.

    Args:
        steps: points on the straight path from nothing to the intact pass.
        over: what the path scales: ``"embeddings"`` of the tokens, ``"gates"`` of all experts, or ``"heads"``.
        baseline: the embedding [D], or one for each token [T D], where the path begins; zeros by default. The
            vocabulary's mean is ``lm.decoder.embedding.mean(0)``. For embeddings only.
        chunk: how many steps to take at a time, to bound memory; all by default.

    Raises:
        PromptError: as in :func:`explain`.
        MoejaxError: no steps, a chunk of none, an unknown ``over``, a baseline that does not fit, weights in float16.
    """
    refuse_half(lm.decoder)
    refuse_wrong_sums()
    question = Question.of(lm, prompt, target)
    length, tokens = len(question.ids), question.tokens(lm)
    path, interventions = _path(lm, tokens, over)
    if steps < 1 or (baseline is not None and over != "embeddings"):
        raise MoejaxError(f"steps={steps} must be positive, and a baseline is for embeddings only.")
    start = _start(lm, length, baseline)
    start = jnp.pad(start, ((0, tokens.shape[1] - length), (0, 0)))
    rows, points = min(checked_chunk(chunk) or steps, steps), (np.arange(steps) + 0.5) / steps
    slopes, ends, ids = dict.fromkeys(interventions, np.zeros(())), np.zeros((2, 0)), np.zeros((0, 0), int)
    for first in range(0, steps, rows):
        here = points[first : first + rows]
        # the intact pass, the path's beginning, then as many steps in every chunk, the last of which may count nothing
        scales = np.pad(np.array([1.0, 0.0, *here]), (0, rows - len(here)), constant_values=1.0)
        counts = np.pad(np.full(len(here), 1 / steps), (2, rows - len(here)))
        scaled = {
            name: ones * jnp.asarray(scales).reshape(-1, *[1] * (ones.ndim - 2)) for name, ones in interventions.items()
        }
        found, *rest = _slopes(lm.flat, tokens, question.seeds, start, scaled, jnp.asarray(counts), path=path)
        # without padding
        slopes = {name: slopes[name] + np.asarray(slope, np.float64)[:, :, :length] for name, slope in found.items()}
        ends, ids = np.asarray(rest[0], np.float64), np.asarray(rest[1])
    slopes = {name: _of_target(slope, target) for name, slope in slopes.items()}
    fields: dict[str, Any] = {name: slope for name, slope in slopes.items() if name in ("heads", "shared")}
    if over == "embeddings":
        fields["tokens"] = slopes["tokens"][:, 0]
    if over == "gates":
        routes = _read(lm, question, Activations())
        fields["feed_forward"] = _by_slot(slopes.get("experts"), routes.routes, lm.config.num_experts)
        attention = slopes.get("attention_experts")
        fields["attention"] = _by_slot(attention, routes.attention_routes, lm.config.num_attention_experts)
    total = _of_target(ends[0] - ends[1], target)
    answer = _scores(lm, question, target, ids, f"integrated gradients over {over}", "the target's", **fields)
    return replace(answer, gap=total - _sum(answer))


Path = Callable[[Decoder, Array, Array, dict[str, Array]], tuple[Array | None, Reading]]
"""What enters the first layer in place of the tokens' embeddings, and the gates."""


def _scaled_embeddings(
    decoder: Decoder, tokens: Array, start: Array, interventions: dict[str, Array]
) -> tuple[Array, Reading]:
    """From ``start`` to the tokens' embeddings."""
    way = decoder.embedding[tokens] - start.astype(decoder.embedding.dtype)
    return start.astype(way.dtype) + gate(way, interventions["tokens"][0][..., None]), Reading()


def _scaled_gates(
    decoder: Decoder, tokens: Array, start: Array, interventions: dict[str, Array]
) -> tuple[None, Reading]:
    return None, Reading(gates=Gates(**interventions))


_PATHS: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    "embeddings": (_scaled_embeddings, ("tokens",)),
    "gates": (_scaled_gates, ("experts", "attention_experts", "shared")),
    "heads": (_scaled_gates, ("heads",)),
}


def _path(lm: LM, tokens: Int[Array, "1 T"], over: str) -> tuple[Path, dict[str, Float[Array, "L 1 T ..."]]]:
    """How to run a point of the path, and the ones that it scales."""
    if over not in _PATHS:
        raise MoejaxError(f"over={over!r} is unknown; choose from {', '.join(_PATHS)}.")
    path, names = _PATHS[over]
    ones = Gates.ones(lm.config, tokens)
    interventions = {name: g for name in names if (g := getattr(ones, name)) is not None}
    if not interventions:
        raise MoejaxError("every layer of this model is dense: there are no gates of experts.")
    return path, interventions if over != "embeddings" else {"tokens": interventions["tokens"][:1]}


def _start(lm: LM, length: int, baseline: Any) -> Float[Array, "T D"]:
    size = (length, lm.config.model_dim)
    if baseline is not None and np.shape(baseline) not in (size, size[1:]):
        raise MoejaxError(f"a baseline of shape {list(np.shape(baseline))} for embeddings of shape {list(size)}.")
    return jnp.broadcast_to(jnp.asarray(0.0 if baseline is None else baseline, decoder_dtype(lm)), size)


@partial(Program, static_argnames="path")
def _slopes(
    weights: FlatDecoder,
    tokens: Int[Array, "1 T"],
    seeds: Seeds,
    start: Float[Array, "T D"],
    interventions: dict[str, Float[Array, "L M T ..."]],
    counts: Float[Array, " M"],
    *,
    path: Path,
) -> tuple[dict[str, Float[Array, "N L T ..."]], Float[Array, "2 N"], Int[Array, "N J"]]:
    """Derivatives by the interventions, summed over the rows as they count; values of the first two rows; the tokens meant."""
    decoder, rows = unflatten(weights), len(counts)
    tokens, seeds = jnp.broadcast_to(tokens, (rows, tokens.shape[1])), spread(seeds, rows)

    def targets(interventions: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        embedded, reading = path(decoder, tokens, start, interventions)
        hidden = hidden_apart(decoder, tokens, reading, embedded)
        aimed, exact = read_as_first(seeds, decoder, hidden, reading)
        return aimed.target, (exact[:2], aimed.ids[0])

    target, pull, (values, ids) = jax.vjp(targets, interventions, has_aux=True)
    seeded = jnp.eye(target.shape[1], dtype=target.dtype)[:, None] * counts.astype(target.dtype)[:, None]
    (slopes,) = jax.vmap(pull)(seeded)
    return {name: slope.sum(2) for name, slope in slopes.items()}, values, ids


def _by_slot(scores: np.ndarray | None, slots: Slots | None, count: int) -> ExpertRelevance | None:
    """Scores by expert id [N L T E] at the routed slots, the first of those that share an expert."""
    if scores is None or slots is None:
        return None
    ids = slots.ids[:, 0]
    taken = np.take_along_axis(scores, np.broadcast_to(ids.clip(0), (len(scores), *ids.shape)), axis=-1)
    again = np.tril(ids[..., :, None] == ids[..., None, :], -1).any(-1)
    return ExpertRelevance(np.where((ids < 0) | again, 0, taken), ids, slots.weights[:, 0], count)


# ---- read by a rule -----------------------------------------------------------------------------------------------


def direct_logit_attribution(lm: LM, prompt: Prompt, *, target: Target = Argmax(), **options: Any) -> Scores:
    """What every component writes times the target's direction, through the final norm's frozen scale, in logits.

    Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; the logit lens for components. The whole
    reading, with its ledger and each layer's stream, is ``explain(.., rule=Direct())``. Its special case ``c_y = W_U``
    of relevance sees no path through a later layer. ``gap`` is what biases and dense layers write.

    Args:
        options: those of :func:`explain`.

    Raises:
        PromptError, MoejaxError: as in :func:`explain`.
    """
    found = explain(lm, prompt, target=target, rule=Direct(), **options)
    answer = Scores(
        method="direct logit attribution",
        unit="logits",
        labels=found.labels,
        positions=found.positions,
        token_ids=found.token_ids,
        pieces=found.pieces,
        tokens=found.tokens,
        feed_forward=found.feed_forward,
        attention=found.attention,
        heads=found.heads,
        shared=found.shared,
    )
    return replace(answer, gap=found.ledger.target - _sum(answer))


def rollout(lm: LM, prompt: Prompt, *, target: Target = Argmax()) -> Scores:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928, section 3): each target's row, which sums to one.

    Patterns are averaged over heads, mixed with the identity for the residual stream, and their rows made to sum to
    one before the layers are multiplied. It knows of a target its position alone.

    Raises:
        PromptError: as in :func:`explain`.
        MoejaxError: weights in float16.
    """
    question = Question.of(lm, prompt, target)
    out = _read(lm, question, Activations(), tuple(f"edges.{layer}" for layer in range(lm.config.num_layers)))
    rows = np.eye(len(question.ids))
    for layer in range(lm.config.num_layers):
        mixed = np.asarray(out.vectors[f"edges.{layer}"][0, 0], np.float64).mean(0) + np.eye(len(rows))
        rows = mixed / mixed.sum(-1, keepdims=True) @ rows
    tokens = rows[[aim.position for aim in question.aims]]
    if target.joint:
        tokens = tokens.mean(0, keepdims=True)
    return _scores(lm, question, target, out.ids[0], "attention rollout", "shares of attention", tokens=tokens)


def router_weight(lm: LM, prompt: Prompt, *, target: Target = Argmax()) -> Scores:
    """The routing weight of every slot; its sum over tokens is SEER-MoE's soft count (arXiv 2404.05089).

    Raises:
        PromptError: as in :func:`explain`.
        MoejaxError: weights in float16.
    """
    return _observed(lm, prompt, target, "router weight", "routing weights", lambda norms, m: m.weights)


def frequency(lm: LM, prompt: Prompt, *, target: Target = Argmax()) -> Scores:
    """The share of the sequence's tokens that are routed to a slot's expert; ``by_expert("mean")`` has it by expert.

    Raises:
        PromptError: as in :func:`explain`.
        MoejaxError: weights in float16.
    """

    def share(norms: np.ndarray, mixture: ExpertRelevance) -> np.ndarray:
        used = mixture.weights != 0
        by_expert = (replace(mixture, slots=used[None].astype(float)).by_token()[0] > 0).mean(1)
        return used * np.stack([row[ids] for row, ids in zip(by_expert, mixture.ids, strict=True)])

    return _observed(lm, prompt, target, "frequency", "shares of tokens", share)


def reap(lm: LM, prompt: Prompt, *, target: Target = Argmax()) -> Scores:
    """REAP (arXiv 2510.13999): ``w ||f||`` of every slot; ``by_expert("mean")`` is the saliency, over routed tokens.

    Raises:
        PromptError: as in :func:`explain`.
        MoejaxError: weights in float16.
    """
    return _observed(lm, prompt, target, "REAP", "norms of weighted outputs", lambda norms, m: norms)


def activation_norm(lm: LM, prompt: Prompt, *, target: Target = Argmax()) -> Scores:
    """``||f||`` of every slot before its weight; ``by_expert("mean")`` is MAN, ``"sum"`` EAN (arXiv 2606.15716).

    Raises:
        PromptError: as in :func:`explain`.
        MoejaxError: weights in float16.
    """

    def norm(norms: np.ndarray, mixture: ExpertRelevance) -> np.ndarray:
        # a layer's weights may have signs, which norms of weighted outputs have lost
        return norms / np.where(mixture.weights == 0, 1, np.abs(mixture.weights))

    return _observed(lm, prompt, target, "activation norm", "norms of outputs", norm)


def _observed(
    lm: LM,
    prompt: Prompt,
    target: Target,
    method: str,
    unit: str,
    score: Callable[[np.ndarray, ExpertRelevance], np.ndarray],
) -> Scores:
    """Scores of both kinds of experts from the norms of their weighted outputs [L T K] and their routing."""
    question = Question.of(lm, prompt, target)
    out, config = _read(lm, question, Activations()), lm.config
    count = 1 if target.joint else len(question.aims)

    def scored(norms: Any, slots: Slots | None, experts: int) -> ExpertRelevance | None:
        if norms is None or slots is None:
            return None
        norms = norms[0, :, 0]
        mixture = ExpertRelevance(norms[None], slots.ids[:, 0], slots.weights[:, 0], experts)
        found = np.where(mixture.ids < 0, 0, score(norms, mixture))
        return replace(mixture, slots=np.broadcast_to(found, (count, *found.shape)))

    feed_forward = scored(out.gates.slots, out.routes, config.num_experts)
    attention = scored(out.gates.attention_slots, out.attention_routes, config.num_attention_experts)
    if feed_forward is None and attention is None:
        raise MoejaxError("every layer of this model is dense: there are no experts.")
    ids = out.ids[0]
    return _scores(lm, question, target, ids, method, unit, feed_forward=feed_forward, attention=attention)


BASELINES: Mapping[str, Baseline] = {
    "integrated-gradients": integrated_gradients,
    "integrated-gates": partial(integrated_gradients, over="gates"),
    "rollout": rollout,
    "direct": direct_logit_attribution,
    "router-weight": router_weight,
    "frequency": frequency,
    "reap": reap,
    "activation-norm": activation_norm,
}
"""Every method with its defaults."""


def _read(lm: LM, question: Question, rule: Activations, nodes: tuple[str, ...] = ()) -> Readout:
    """One backward pass that every layer takes part in, whatever the target; on the host."""
    seeds, length = question.seeds, len(question.ids)
    if not isinstance(seeds, LogitSeeds):
        last, one = jnp.full((1, 1), length - 1), jnp.ones((1, 1, 1), decoder_dtype(lm))
        seeds = LogitSeeds.of(last, jnp.zeros(one.shape, jnp.int32), one)
    out = relevance(lm.flat, question.tokens(lm), None, seeds, Gates(), rule=rule, nodes=nodes, joint=True)
    return jax.device_get(out._replace(logits=None)).cut(length)


def _scores(
    lm: LM, question: Question, target: Target, ids: np.ndarray, method: str, unit: str, **fields: Any
) -> Scores:
    aims, token_ids = question.aims, question.ids
    labels = [target.label(lm, aim, ids[n]) for n, aim in enumerate(aims)]
    return Scores(
        method=method,
        unit=unit,
        labels=[" + ".join(labels)] if target.joint else labels,
        positions=np.array([aim.position for aim in (aims[-1:] if target.joint else aims)]),
        token_ids=np.array(token_ids),
        pieces=lm.pieces(token_ids),
        **fields,
    )


def _sum(scores: Scores) -> Float[np.ndarray, " N"]:
    """Of all scores that add up: heads of a mixture of attention experts are those experts over again."""
    both = scores.attention is not None
    mixtures = [m.slots for m in (scores.feed_forward, scores.attention) if m is not None]
    parts = [scores.tokens, scores.shared, None if both else scores.heads, *mixtures]
    return sum((p.reshape(len(p), -1).sum(-1, dtype=np.float64) for p in parts if p is not None), np.zeros(1))


def _of_target(values: np.ndarray, target: Target) -> np.ndarray:
    """The sum over a joint target's parts, along the first axis."""
    return values.sum(0, keepdims=True) if target.joint else values
