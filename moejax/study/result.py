"""Statistics of routing from sums, as a person reads them; what nothing contributes to is absent, not zero."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import comb
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from moejax.routing import statistics as s
from moejax.study.accumulators import MixtureLayer, RoutingSums
from moejax.study.similarity import Similarity

LEAST = 32
"""Slots below which a token id does not count for specialisation: small samples look specialised by chance."""


@dataclass(frozen=True)
class LayerStatistics:
    """Of one mixture. A value to which no token contributed is ``None``. Formulas: ``moejax.routing.statistics``.

    Attributes:
        layer: its number in the decoder.
        experts, slots: that there are, and that a token has.
        tokens, nan_tokens: that count, and those that do not because the router gave NaN.
        router_entropy, weight_entropy: of softmax(logits) over routes and of the slots' weights, over its largest
            value, in [0, 1]; ``.._nats`` the same in nats.
        router_margin, weight_margin: best minus second, in [0, 1].
        active_slots: slots of a token that carry something, on average.
        usage_entropy, relative_perplexity, jain_index: evenness of usage, at most 1.
        largest_load: of the busiest expert, over an even share.
        dead: experts that no token selected.
        token_specialisation: share of the uncertainty about the expert that the token's id takes away, in [0, 1],
            of ``token_ids`` ids with at least :data:`LEAST` slots.
        label_divergence: Jensen-Shannon divergence of the labels' usages, in [0, 1].
        expert_similarity, router_similarity: mean pairwise cosine of experts' weights, and of the router's rows.
        output_similarity: mean pairwise cosine of the outputs of a token's experts, if asked for.
        utilisation, first_choice: share of slots of each expert, and of tokens of which it is the first choice.
        coactivation: ``[i, j]`` is the share of expert i's tokens that also selected j.
        label_usage, label_entropy: share of a label's slots of each expert, and the evenness of it, in [0, 1].
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
    label_usage: Float[np.ndarray, "G E"] | None = None
    label_entropy: tuple[float | None, ...] | None = None
    label_divergences: Float[np.ndarray, "G G"] | None = None


@dataclass(frozen=True)
class RoutingStatistics:
    """Of all mixtures of one kind.

    Attributes:
        layer_overlap: mean intersection over union of a token's sets in two of ``layers``, in [0, 1]; -1 where no
            token has a set.
        random_overlap: what it would be of sets drawn at random, if all layers have the same sizes.
    """

    layers: tuple[LayerStatistics, ...]
    layer_overlap: Float[np.ndarray, "L L"] | None
    random_overlap: float | None


def routing_statistics(
    mixtures: Sequence[MixtureLayer], sums: RoutingSums, labelled: bool, similar: Sequence[Similarity]
) -> RoutingStatistics:
    """The statistics of sums over data; ``similar`` has an entry for every mixture."""
    layers = tuple(
        _layer(mixture, jax.tree.map(lambda leaf, i=i: leaf[i], sums), labelled, similar[i])
        for i, mixture in enumerate(mixtures)
    )
    pairs = np.asarray(sums.overlap_tokens)
    overlap = np.where(pairs > 0, np.asarray(sums.overlap) / np.maximum(pairs, 1), -1.0)
    # to compare with, sets must have one size
    sizes = {(m.experts, m.slots) for m in mixtures if m.slots <= m.experts}
    size = sizes.pop() if len(sizes) == 1 and all(m.active_slots == m.slots for m in layers) else None
    return RoutingStatistics(layers, overlap if pairs.any() else None, size and random_iou(*size))


def random_iou(experts: int, slots: int) -> float:
    """Expected intersection over union of two sets of ``slots`` out of ``experts``, drawn uniformly."""
    ways = [comb(slots, j) * comb(experts - slots, slots - j) for j in range(slots + 1)]
    return sum(w * j / (2 * slots - j) for j, w in enumerate(ways)) / sum(ways)


def _layer(mixture: MixtureLayer, sums: RoutingSums, labelled: bool, similar: Similarity) -> LayerStatistics:
    number, experts, slots, routes = mixture
    tokens, routed = int(sums.tokens), int(sums.routed)
    found: dict[str, Any] = {"expert_similarity": similar.experts, "router_similarity": similar.router}
    if sums.alike is not None and sums.alike_tokens:
        found["output_similarity"] = float(sums.alike) / int(sums.alike_tokens)
    if tokens:
        entropy = float(sums.router_entropy) / tokens
        found |= {"router_entropy_nats": entropy, "router_entropy": _over(entropy, routes)}
        found |= {"router_margin": float(sums.router_margin) / tokens if routes > 1 else None}
        found |= {"active_slots": float(np.sum(sums.counts)) / tokens}
    if routed:
        entropy = float(sums.weight_entropy) / routed
        found |= {"weight_entropy_nats": entropy, "weight_entropy": _over(entropy, slots)}
        found |= {"weight_margin": float(sums.weight_margin) / routed if slots > 1 else None}
        found |= _of_counts(sums, experts, labelled)
    return LayerStatistics(number, experts, slots, tokens, int(sums.nan), **found)


def _of_counts(sums: RoutingSums, experts: int, labelled: bool) -> dict[str, Any]:
    counts = np.asarray(sums.counts)[:experts]
    by_label = np.asarray(sums.by_label)[:, :experts] if labelled else None
    by_token = None if sums.by_token is None else np.asarray(sums.by_token)[:, :experts]
    first, pairs = np.asarray(sums.first)[:experts], np.asarray(sums.coactivation)[:experts, :experts]
    arrays = (counts, first, pairs, by_label, by_token)
    # shares are wanted: float32 holds those of counts of any size
    derived = jax.device_get(_derived(*(None if a is None else a.astype(np.float32) for a in arrays)))
    found: dict[str, Any] = {name: float(value) if np.ndim(value) == 0 else value for name, value in derived.items()}
    if experts == 1:
        found["usage_entropy"] = None
    found["dead"] = tuple(np.flatnonzero(counts == 0).tolist())
    if by_token is not None:
        found["token_ids"] = int((by_token.sum(-1) >= LEAST).sum())
        found["token_specialisation"] = found["token_specialisation"] if found["token_ids"] > 1 else None
    if by_label is not None:
        present = by_label.sum(-1) > 0
        entropies = zip(found["label_entropy"], present, strict=True)
        found["label_entropy"] = tuple(float(h) if there and experts > 1 else None for h, there in entropies)
        found["label_divergence"] = found["label_divergence"] if present.sum() > 1 and experts > 1 else None
    return found


@jax.jit
def _derived(
    counts: Float[Array, " E"],
    first: Float[Array, " E"],
    coactivation: Float[Array, "E E"],
    by_label: Float[Array, "G E"] | None,
    by_token: Float[Array, "V E"] | None,
) -> dict[str, Array]:
    found = {
        "usage_entropy": s.usage_entropy(counts),
        "relative_perplexity": s.relative_perplexity(counts),
        "jain_index": s.jain_index(counts),
        "largest_load": s.largest_load(counts),
        "utilisation": s.shares(counts),
        "first_choice": s.shares(first),
        "coactivation": s.conditional_coactivation(coactivation),
    }
    if by_token is not None:
        found["token_specialisation"] = s.specialisation(by_token, LEAST)
    if by_label is not None:
        found |= {"label_usage": s.shares(by_label), "label_entropy": s.usage_entropy(by_label)}
        found |= {"label_divergence": s.divergence(by_label), "label_divergences": s.pairwise_divergence(by_label)}
    return found


def _over(nats: float, options: int) -> float | None:
    return nats / float(np.log(options)) if options > 1 else None


def plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as the dictionaries and lists of JSON; seven digits of every float."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
