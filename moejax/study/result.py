"""Routing statistics for people to read, computed from sums; a value without any contribution is ``None``, not zero."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import comb
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from moejax.report.numbers import number
from moejax.routing import statistics as s
from moejax.study.accumulators import MixtureSizes, RoutingSums
from moejax.study.similarity import Similarity

MIN_SLOTS = 32
"""Fewest slots with which a token id counts for specialisation: small samples look specialised by chance."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one mixture; a value to which no token contributed is ``None``. X counts labels.

    :mod:`moejax.routing.statistics` has the formulas.

    Attributes:
        layer: index of the layer in the decoder.
        experts: number of experts.
        slots: routed slots of a token.
        tokens: tokens that count.
        nan_tokens: tokens that do not count because the router gave NaN.
        router_entropy: mean entropy of softmax(logits) over its largest value, in [0, 1]; ``router_entropy_nats`` is
            the same in nats.
        weight_entropy: mean entropy of the slots' weights over its largest value, in [0, 1]; ``weight_entropy_nats`` is
            the same in nats.
        router_margin, weight_margin: mean of best minus second-best probability or weight, in [0, 1].
        active_slots: mean number of slots of a token whose weight is not zero.
        usage_entropy, relative_perplexity, jain_index: evenness of the usage, at most 1.
        largest_load: load of the busiest expert over the load of an even usage.
        dead: ids of the experts that no token selected.
        token_specialisation: fraction of the uncertainty about the expert that the token id removes, in [0, 1].
        token_ids: number of token ids with at least :data:`MIN_SLOTS` slots, from which it was computed.
        label_divergence: Jensen-Shannon divergence of the labels' usages, in [0, 1].
        expert_similarity, router_similarity: mean pairwise cosine of experts' weights, and of the router's rows.
        output_similarity: mean pairwise cosine of the outputs of a token's experts, if requested.
        utilisation: fraction of all slots that each expert fills.
        first_choice: fraction of tokens whose first choice each expert is.
        coactivation: ``[i, j]`` is the fraction of expert i's tokens that also selected j.
        label_usage: fraction of a label's slots that each expert fills.
        label_entropy: evenness of each label's usage, in [0, 1].
        label_divergences: Jensen-Shannon divergence of each two labels, in [0, 1].
    """

    layer: int
    experts: int
    slots: int
    tokens: int
    nan_tokens: int
    router_entropy: float | None = None
    router_entropy_nats: float | None = None
    weight_entropy: float | None = None
    weight_entropy_nats: float | None = None
    router_margin: float | None = None
    weight_margin: float | None = None
    active_slots: float | None = None
    usage_entropy: float | None = None
    relative_perplexity: float | None = None
    jain_index: float | None = None
    largest_load: float | None = None
    dead: tuple[int, ...] | None = None
    token_specialisation: float | None = None
    token_ids: int | None = None
    label_divergence: float | None = None
    expert_similarity: float | None = None
    router_similarity: float | None = None
    output_similarity: float | None = None
    utilisation: Float[np.ndarray, " E"] | None = None
    first_choice: Float[np.ndarray, " E"] | None = None
    coactivation: Float[np.ndarray, "E E"] | None = None
    label_usage: Float[np.ndarray, "X E"] | None = None
    label_entropy: tuple[float | None, ...] | None = None
    label_divergences: Float[np.ndarray, "X X"] | None = None


@dataclass(frozen=True)
class RoutingStatistics:
    """Statistics of all mixtures of one kind; L counts their layers only.

    Attributes:
        layers: statistics of each mixture.
        layer_overlap: mean intersection over union of a token's experts in each two layers, in [0, 1]; -1 where no
            token has any.
        random_overlap: the expected overlap of sets drawn at random; ``None`` unless all layers have the same sizes.
    """

    layers: tuple[LayerStatistics, ...]
    layer_overlap: Float[np.ndarray, "L L"] | None
    random_overlap: float | None


def routing_statistics(
    mixtures: Sequence[MixtureSizes], sums: RoutingSums, labelled: bool, similar: Sequence[Similarity]
) -> RoutingStatistics:
    """Statistics from sums over data; ``similar`` has an entry for every mixture."""
    layers = tuple(
        _layer(mixture, jax.tree.map(lambda leaf, i=i: leaf[i], sums), labelled, similar[i])
        for i, mixture in enumerate(mixtures)
    )
    pairs = np.asarray(sums.overlap_tokens)
    overlap = np.where(pairs > 0, np.asarray(sums.overlap) / np.maximum(pairs, 1), -1.0)
    # the expectation assumes that all sets have the same size
    sizes = {(m.experts, m.slots) for m in mixtures if m.slots <= m.experts}
    size = sizes.pop() if len(sizes) == 1 and all(m.active_slots == m.slots for m in layers) else None
    return RoutingStatistics(layers, overlap if pairs.any() else None, size and random_iou(*size))


def random_iou(experts: int, slots: int) -> float:
    """Expected intersection over union of two sets of ``slots`` out of ``experts``, drawn uniformly."""
    ways = [comb(slots, j) * comb(experts - slots, slots - j) for j in range(slots + 1)]
    return sum(w * j / (2 * slots - j) for j, w in enumerate(ways)) / sum(ways)


def _layer(mixture: MixtureSizes, sums: RoutingSums, labelled: bool, similar: Similarity) -> LayerStatistics:
    number, experts, slots, routes = mixture
    tokens, routed = int(sums.tokens), int(sums.routed)
    values: dict[str, Any] = {"expert_similarity": similar.experts, "router_similarity": similar.router}
    if sums.alike is not None and sums.alike_tokens:
        values["output_similarity"] = float(sums.alike) / int(sums.alike_tokens)
    if tokens:
        entropy = float(sums.router_entropy) / tokens
        values |= {"router_entropy_nats": entropy, "router_entropy": _relative(entropy, routes)}
        values |= {"router_margin": float(sums.router_margin) / tokens if routes > 1 else None}
        values |= {"active_slots": float(np.sum(sums.counts)) / tokens}
    if routed:
        entropy = float(sums.weight_entropy) / routed
        values |= {"weight_entropy_nats": entropy, "weight_entropy": _relative(entropy, slots)}
        values |= {"weight_margin": float(sums.weight_margin) / routed if slots > 1 else None}
        values |= _usage_values(sums, experts, labelled)
    return LayerStatistics(number, experts, slots, tokens, int(sums.nan), **values)


def _usage_values(sums: RoutingSums, experts: int, labelled: bool) -> dict[str, Any]:
    """The fields of :class:`LayerStatistics` that are functions of counts."""
    counts = np.asarray(sums.counts)[:experts]
    by_label = np.asarray(sums.by_label)[:, :experts] if labelled else None
    by_token = None if sums.by_token is None else np.asarray(sums.by_token)[:, :experts]
    first, pairs = np.asarray(sums.first)[:experts], np.asarray(sums.coactivation)[:experts, :experts]
    arrays = (counts, first, pairs, by_label, by_token)
    # fractions are computed from the counts, and float32 is precise enough for them whatever the counts' size
    derived = jax.device_get(_derived(*(None if a is None else a.astype(np.float32) for a in arrays)))
    values: dict[str, Any] = {name: float(value) if np.ndim(value) == 0 else value for name, value in derived.items()}
    if experts == 1:
        values["usage_entropy"] = None
    values["dead"] = tuple(np.flatnonzero(counts == 0).tolist())
    if by_token is not None:
        values["token_ids"] = int((by_token.sum(-1) >= MIN_SLOTS).sum())
        values["token_specialisation"] = values["token_specialisation"] if values["token_ids"] > 1 else None
    if by_label is not None:
        present = by_label.sum(-1) > 0
        entropies = zip(values["label_entropy"], present, strict=True)
        values["label_entropy"] = tuple(float(nats) if used and experts > 1 else None for nats, used in entropies)
        values["label_divergence"] = values["label_divergence"] if present.sum() > 1 and experts > 1 else None
    return values


@jax.jit
def _derived(
    counts: Float[Array, " E"],
    first: Float[Array, " E"],
    coactivation: Float[Array, "E E"],
    by_label: Float[Array, "X E"] | None,
    by_token: Float[Array, "V E"] | None,
) -> dict[str, Array]:
    values = {
        "usage_entropy": s.usage_entropy(counts),
        "relative_perplexity": s.relative_perplexity(counts),
        "jain_index": s.jain_index(counts),
        "largest_load": s.largest_load(counts),
        "utilisation": s.shares(counts),
        "first_choice": s.shares(first),
        "coactivation": s.conditional_coactivation(coactivation),
    }
    if by_token is not None:
        values["token_specialisation"] = s.specialisation(by_token, MIN_SLOTS)
    if by_label is not None:
        values |= {"label_usage": s.shares(by_label), "label_entropy": s.usage_entropy(by_label)}
        values |= {"label_divergence": s.divergence(by_label), "label_divergences": s.pairwise_divergence(by_label)}
    return values


def _relative(nats: float, options: int) -> float | None:
    """An entropy over its largest value ``ln options``; ``None`` if there is only one option."""
    return nats / float(np.log(options)) if options > 1 else None


def plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as dictionaries and lists for JSON; floats are rounded to seven digits.

    A number that is not finite is ``None``.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return number(float(f"{value:.7g}")) if isinstance(value, float) else value
