"""Attention rollout: attention patterns of all layers, multiplied."""

import numpy as np

from moejax.lm import LM, Prompt
from moejax.relevance.baselines.activations import read_activations
from moejax.relevance.baselines.scores import Scores, register_baseline
from moejax.relevance.question import ResolvedTarget
from moejax.relevance.targets import Argmax, TargetLike


@register_baseline("rollout")
def rollout(lm: LM, prompt: Prompt, *, target: TargetLike = Argmax()) -> Scores:
    """Compute attention rollout (Abnar and Zuidema, arXiv 2005.00928, section 3).

    Patterns are averaged over heads, mixed with the identity for the residual stream, and scaled so that their rows sum
    to one; then the layers are multiplied. The scores are the row at the target's position, which sums to one. Nothing
    else about the target counts.

    Raises:
        PromptError: as in :func:`moejax.explain`.
        MoejaxError: weights in float16.
    """
    resolved = ResolvedTarget.of(lm, [prompt], target)
    layers = range(lm.config.num_layers)
    out = read_activations(resolved, tuple(f"edges.{layer}" for layer in layers))
    rows = np.eye(resolved.length)
    for layer in layers:
        mixed = np.asarray(out.vectors[f"edges.{layer}"][0, 0], np.float64).mean(0) + np.eye(len(rows))
        rows = mixed / mixed.sum(-1, keepdims=True) @ rows
    tokens = rows[[terms.position for terms in resolved.terms[0]]]
    if resolved.target.joint:
        tokens = tokens.mean(0, keepdims=True)
    return Scores.of(resolved, out.ids[0], method="attention rollout", unit="shares of attention", tokens=tokens)
