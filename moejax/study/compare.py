"""Comparing two checkpoints on the same data: which of a token's experts they share."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.models import FlatDecoder, unflatten
from moejax.program import Program
from moejax.routing.statistics import token_overlap
from moejax.study.accumulate import accumulate
from moejax.study.accumulators import MIXTURE_KINDS, MixtureKind, mixtures
from moejax.study.data import WindowBatch, Windows


@dataclass(frozen=True)
class LayerChange:
    """How far the selections of two checkpoints agree in one layer.

    Attributes:
        layer: index of the layer in the decoder.
        tokens: tokens that count.
        overlap: mean fraction of a token's experts in the other checkpoint that this one selects too, in [0, 1]; this
            is router saturation if the other checkpoint is the final one. ``None`` without tokens.
        switch_rate: ``1 - overlap``.
    """

    layer: int
    tokens: int
    overlap: float | None
    switch_rate: float | None


class _Overlap(NamedTuple):
    """Sums of the overlaps of single tokens, and the number of tokens."""

    shares: Float[Array, " L"]
    tokens: Int[Array, " L"]


def compare(lm: LM, other: LM, windows: Windows, *, progress: bool = False) -> dict[MixtureKind, list[LayerChange]]:
    """Set overlap of two models' selections (:func:`moejax.routing.statistics.set_overlap`) for each layer, by kind.

    Raises:
        MoejaxError: the models differ in vocabulary, in which layers are mixtures, or in the number of experts.
    """
    _check_same_architecture(lm, other)
    sums = accumulate(partial(_measure, lm.flat, other.flat), windows, "comparing", progress)
    return {kind: _changes([m.layer for m in sizes], sums[kind]) for kind, sizes in mixtures(lm.decoder).items()}


def _check_same_architecture(lm: LM, other: LM) -> None:
    """Raise MoejaxError unless the two can be checkpoints of one model."""
    config, other_config = lm.config, other.config
    vocabularies = config.vocab_size, other_config.vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise MoejaxError(
            f"{lm.name} and {other.name} are not checkpoints of one model: their vocabularies have {vocabularies[0]} "
            f"and {vocabularies[1]} tokens."
        )
    both = mixtures(lm.decoder), mixtures(other.decoder)
    for kind in MIXTURE_KINDS:
        experts = [{m.layer: m.experts for m in sizes.get(kind, [])} for sizes in both]
        layers = [i for i in range(config.num_layers) if experts[0].get(i) != experts[1].get(i)]
        if layers or config.num_layers != other_config.num_layers:
            raise MoejaxError(
                f"{lm.name} and {other.name} are not checkpoints of one model: {config.num_layers} and "
                f"{other_config.num_layers} layers"
                + (f", different numbers of {kind} experts in layer {layers[0]}." if layers else ".")
            )


def _changes(layers: list[int], sums: _Overlap) -> list[LayerChange]:
    changes = []
    for layer, total, tokens in zip(layers, sums.shares, np.asarray(sums.tokens).tolist(), strict=True):
        overlap = float(total) / tokens if tokens else None
        changes.append(LayerChange(layer, tokens, overlap, None if overlap is None else 1 - overlap))
    return changes


@Program
def _measure(weights: FlatDecoder, other: FlatDecoder, batch: WindowBatch) -> dict[MixtureKind, _Overlap]:
    both = [unflatten(w).hidden(batch.tokens, valid=batch.valid) for w in (weights, other)]
    by_kind = {}
    for kind in MIXTURE_KINDS:
        pairs = zip(*(hidden.routing(kind) for hidden in both), strict=True)
        sums = []
        for first, second in pairs:
            if first is None or second is None:
                continue
            shares, counted = token_overlap(first.ids, second.ids, first.weights, second.weights)
            finite = jnp.isfinite(first.weights).all(-1) & jnp.isfinite(second.weights).all(-1)
            counted &= batch.valid & finite
            sums.append(_Overlap(jnp.where(counted, shares, 0).sum(), counted.sum(dtype=jnp.int32)))
        if sums:
            by_kind[kind] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)
    return by_kind
