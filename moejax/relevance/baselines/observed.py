"""Baselines that observe the forward pass: routing weights, frequencies, norms of experts' outputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moejax.errors import MoejaxError
from moejax.lm import LM, Prompt
from moejax.relevance.baselines.activations import read_activations
from moejax.relevance.baselines.scores import Scores, register_baseline
from moejax.relevance.engine import Slots
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.question import ResolvedTarget
from moejax.relevance.targets import Argmax, TargetLike


@register_baseline("router-weight")
def router_weight(lm: LM, prompt: Prompt, *, target: TargetLike = Argmax()) -> Scores:
    """Score every slot by its routing weight; the sum over tokens is SEER-MoE's soft count (arXiv 2404.05089).

    Raises:
        PromptError: as in :func:`moejax.explain`.
        MoejaxError: weights in float16.
    """
    return _observed(lm, prompt, target, "router weight", "routing weights", lambda norms, m: m.weights)


@register_baseline("frequency")
def frequency(lm: LM, prompt: Prompt, *, target: TargetLike = Argmax()) -> Scores:
    """Score every slot by the share of the sequence's tokens that are routed to its expert.

    ``by_expert("mean")`` is that share by expert.

    Raises:
        PromptError: as in :func:`moejax.explain`.
        MoejaxError: weights in float16.
    """

    def share_of_tokens(norms: np.ndarray, mixture: ExpertRelevance) -> np.ndarray:
        used = mixture.weights != 0
        by_expert = (replace(mixture, slots=used[None].astype(float)).by_token()[0] > 0).mean(1)
        return used * np.stack([row[ids] for row, ids in zip(by_expert, mixture.ids, strict=True)])

    return _observed(lm, prompt, target, "frequency", "shares of tokens", share_of_tokens)


@register_baseline("reap")
def reap(lm: LM, prompt: Prompt, *, target: TargetLike = Argmax()) -> Scores:
    """Score every slot by ``w ||f||``, the norm of its weighted output, as REAP does (arXiv 2510.13999).

    ``by_expert("mean")`` is REAP's saliency, an average over the routed tokens.

    Raises:
        PromptError: as in :func:`moejax.explain`.
        MoejaxError: weights in float16.
    """
    return _observed(lm, prompt, target, "REAP", "norms of weighted outputs", lambda norms, m: norms)


@register_baseline("activation-norm")
def activation_norm(lm: LM, prompt: Prompt, *, target: TargetLike = Argmax()) -> Scores:
    """Score every slot by ``||f||``, the norm of its output before its weight.

    ``by_expert("mean")`` is MAN, ``by_expert("sum")`` is EAN (arXiv 2606.15716).

    Raises:
        PromptError: as in :func:`moejax.explain`.
        MoejaxError: weights in float16.
    """

    def norm(norms: np.ndarray, mixture: ExpertRelevance) -> np.ndarray:
        # weights of some layers are negative; norms of weighted outputs have lost that sign
        return norms / np.where(mixture.weights == 0, 1, np.abs(mixture.weights))

    return _observed(lm, prompt, target, "activation norm", "norms of outputs", norm)


def _observed(
    lm: LM,
    prompt: Prompt,
    target: TargetLike,
    method: str,
    unit: str,
    score: Callable[[np.ndarray, ExpertRelevance], np.ndarray],
) -> Scores:
    """Score the experts of both kinds.

    Args:
        score: computes the scores from the norms of the slots' weighted outputs [L T K] and the slots' routing.

    Raises:
        MoejaxError: no layer has experts.
    """
    resolved = ResolvedTarget.of(lm, [prompt], target)
    out, config = read_activations(resolved), lm.config
    count = resolved.num_cotangents

    def scored(norms: Any, slots: Slots | None, experts: int) -> ExpertRelevance | None:
        if norms is None or slots is None:
            return None
        norms = norms[0, :, 0]
        mixture = ExpertRelevance(norms[None], slots.ids[:, 0], slots.weights[:, 0], experts)
        scores = np.where(mixture.ids < 0, 0, score(norms, mixture))
        return replace(mixture, slots=np.broadcast_to(scores, (count, *scores.shape)))

    feed_forward = scored(out.gates.slots, out.routes, config.num_experts)
    attention = scored(out.gates.attention_slots, out.attention_routes, config.num_attention_experts)
    if feed_forward is None and attention is None:
        raise MoejaxError("every layer of this model is dense: there are no experts.")
    return Scores.of(resolved, out.ids[0], method=method, unit=unit, feed_forward=feed_forward, attention=attention)
