"""Baselines that integrate gradients along a path from nothing to the intact pass."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError
from moejax.lm import LM, Prompt
from moejax.models import Decoder, FlatDecoder, unflatten
from moejax.ops.cotangents import gate
from moejax.program import Program
from moejax.relevance.baselines.activations import read_activations
from moejax.relevance.baselines.scores import Scores, register_baseline, sum_of_joint
from moejax.relevance.engine import Slots, checked_chunk, refuse_half
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.question import ResolvedTarget, hidden_per_sequence, read_first_rows_tokens, repeat_rows
from moejax.relevance.seeds import Seeds
from moejax.relevance.targets import Argmax, TargetLike
from moejax.rules import Gates, Reading
from moejax.xla import refuse_wrong_sums


@register_baseline("integrated-gradients", variants={"integrated-gates": {"over": "gates"}})
def integrated_gradients(
    lm: LM,
    prompt: Prompt,
    *,
    target: TargetLike = Argmax(),
    steps: int = 20,
    over: str = "embeddings",
    baseline: Any = None,
    chunk: int | None = None,
) -> Scores:
    """Compute integrated gradients (Sundararajan et al., arXiv 1703.01365, eq. 1) by the midpoint rule.

    Scores have the target's unit. ``gap`` is the error of the steps; over experts it also contains the scores of
    experts that run on the path but not in the intact pass.

    Args:
        steps: number of points on the straight path from the baseline to the intact pass.
        over: what the path scales: ``"embeddings"`` of the tokens, ``"gates"`` of all experts, or ``"heads"``.
        baseline: the embedding [D], or one for each token [T D], at which the path begins; by default zeros. The
            vocabulary's mean is ``lm.decoder.embedding.mean(0)``. For embeddings only.
        chunk: how many steps to take at a time, to bound memory; by default all.

    Raises:
        PromptError: as in :func:`moejax.explain`.
        MoejaxError: no steps, a chunk that is not positive, an unknown ``over``, a baseline that does not fit, weights
            in float16.
    """
    refuse_half(lm.decoder)
    refuse_wrong_sums()
    resolved = ResolvedTarget.of(lm, [prompt], target)
    length, tokens = resolved.length, resolved.tokens()
    path, interventions = _path(lm, tokens, over)
    if steps < 1 or (baseline is not None and over != "embeddings"):
        raise MoejaxError(f"steps={steps} must be positive, and a baseline is for embeddings only.")
    start = _start(lm, length, baseline)
    start = jnp.pad(start, ((0, tokens.shape[1] - length), (0, 0)))
    rows, points = min(checked_chunk(chunk) or steps, steps), (np.arange(steps) + 0.5) / steps
    slopes, ends, ids = dict.fromkeys(interventions, np.zeros(())), np.zeros((2, 0)), np.zeros((0, 0), int)
    for first in range(0, steps, rows):
        part = points[first : first + rows]
        # the intact pass, the beginning of the path, then the same number of steps in every chunk; steps that fill up
        # the last chunk count nothing
        scales = np.pad(np.array([1.0, 0.0, *part]), (0, rows - len(part)), constant_values=1.0)
        counts = np.pad(np.full(len(part), 1 / steps), (2, rows - len(part)))
        scaled = {
            name: ones * jnp.asarray(scales).reshape(-1, *[1] * (ones.ndim - 2)) for name, ones in interventions.items()
        }
        sums, *rest = _slopes(lm.flat, tokens, resolved.seeds, start, scaled, jnp.asarray(counts), path=path)
        # without padding
        slopes = {name: slopes[name] + np.asarray(slope, np.float64)[:, :, :length] for name, slope in sums.items()}
        ends, ids = np.asarray(rest[0], np.float64), np.asarray(rest[1])
    slopes = {name: sum_of_joint(slope, resolved.target) for name, slope in slopes.items()}
    scores = _by_part(resolved, over, slopes)
    answer = Scores.of(resolved, ids, method=f"integrated gradients over {over}", unit="the target's", **scores)
    return replace(answer, gap=sum_of_joint(ends[0] - ends[1], resolved.target) - answer.total())


def _by_part(resolved: ResolvedTarget, over: str, slopes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the fields of :class:`Scores` from the integrals by gate."""
    scores: dict[str, Any] = {name: slope for name, slope in slopes.items() if name in ("heads", "shared")}
    if over == "embeddings":
        scores["tokens"] = slopes["tokens"][:, 0]
    if over == "gates":
        config, out = resolved.lm.config, read_activations(resolved)
        scores["feed_forward"] = _by_slot(slopes.get("experts"), out.routes, config.num_experts)
        attention = slopes.get("attention_experts")
        scores["attention"] = _by_slot(attention, out.attention_routes, config.num_attention_experts)
    return scores


Path = Callable[[Decoder, Array, Array, dict[str, Array]], tuple[Array | None, Reading]]
"""A function that returns the input of the first layer, in place of the tokens' embeddings, and the reading."""


def _scaled_embeddings(
    decoder: Decoder, tokens: Array, start: Array, interventions: dict[str, Array]
) -> tuple[Array, Reading]:
    """Return a point between ``start`` and the tokens' embeddings."""
    difference = decoder.embed(tokens) - start.astype(decoder.embedding.dtype)
    return start.astype(difference.dtype) + gate(difference, interventions["tokens"][0][..., None]), Reading()


def _scaled_gates(
    decoder: Decoder, tokens: Array, start: Array, interventions: dict[str, Array]
) -> tuple[None, Reading]:
    """Scale the gates and leave the embeddings as they are."""
    return None, Reading(gates=Gates(**interventions))


_PATHS: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    "embeddings": (_scaled_embeddings, ("tokens",)),
    "gates": (_scaled_gates, ("experts", "attention_experts", "shared")),
    "heads": (_scaled_gates, ("heads",)),
}


def _path(lm: LM, tokens: Int[Array, "1 T"], over: str) -> tuple[Path, dict[str, Float[Array, "L 1 T ..."]]]:
    """Return the function that runs a point of the path, and the ones that the path scales.

    Raises:
        MoejaxError: an unknown ``over``, or a model without such parts.
    """
    if over not in _PATHS:
        raise MoejaxError(f"over={over!r} is unknown; choose from {', '.join(_PATHS)}.")
    path, names = _PATHS[over]
    ones = Gates.ones(lm.config, tokens)
    interventions = {name: g for name in names if (g := getattr(ones, name)) is not None}
    if not interventions:
        raise MoejaxError("every layer of this model is dense: there are no gates of experts.")
    return path, interventions if over != "embeddings" else {"tokens": interventions["tokens"][:1]}


def _start(lm: LM, length: int, baseline: Any) -> Float[Array, "T D"]:
    """Return the embedding of each token at which the path begins.

    Raises:
        MoejaxError: ``baseline`` has another shape.
    """
    size = (length, lm.config.model_dim)
    if baseline is not None and np.shape(baseline) not in (size, size[1:]):
        raise MoejaxError(f"a baseline of shape {list(np.shape(baseline))} for embeddings of shape {list(size)}.")
    return jnp.broadcast_to(jnp.asarray(0.0 if baseline is None else baseline, lm.decoder.accumulation_dtype), size)


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
    """Differentiate the targets by the interventions at several points of the path.

    Args:
        counts: factor of each row in the sum of derivatives.

    Returns:
        The sums of derivatives by gate, the targets' values in the first two rows, and the ids of their terms.
    """
    decoder, rows = unflatten(weights), len(counts)
    tokens, seeds = jnp.broadcast_to(tokens, (rows, tokens.shape[1])), repeat_rows(seeds, rows)

    def targets(interventions: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        embedded, reading = path(decoder, tokens, start, interventions)
        hidden = hidden_per_sequence(decoder, tokens, reading, embedded)
        read, exact = read_first_rows_tokens(seeds, decoder, hidden, reading)
        return read.target, (exact[:2], read.ids[0])

    target, pull, (values, ids) = jax.vjp(targets, interventions, has_aux=True)
    seeded = jnp.eye(target.shape[1], dtype=target.dtype)[:, None] * counts.astype(target.dtype)[:, None]
    (slopes,) = jax.vmap(pull)(seeded)
    return {name: slope.sum(2) for name, slope in slopes.items()}, values, ids


def _by_slot(scores: np.ndarray | None, slots: Slots | None, count: int) -> ExpertRelevance | None:
    """Return scores by expert id [N L T E] by routed slot; if slots share an expert, the first has its score."""
    if scores is None or slots is None:
        return None
    ids = slots.ids[:, 0]
    taken = np.take_along_axis(scores, np.broadcast_to(ids.clip(0), (len(scores), *ids.shape)), axis=-1)
    repeated = np.tril(ids[..., :, None] == ids[..., None, :], -1).any(-1)
    return ExpertRelevance(np.where((ids < 0) | repeated, 0, taken), ids, slots.weights[:, 0], count)
