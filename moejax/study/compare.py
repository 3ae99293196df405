"""Two checkpoints on the same data: which of a token's experts they share."""

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
from moejax.study.accumulators import KINDS, Kind, mixtures
from moejax.study.data import Batch, Windows


@dataclass(frozen=True)
class LayerChange:
    """Of one layer.

    Attributes:
        overlap: mean share of a token's experts in the other checkpoint that this one selects too, in [0, 1]:
            saturation, if the other is the final one. ``None`` without tokens.
        switch_rate: the rest of 1.
    """

    layer: int
    tokens: int
    overlap: float | None
    switch_rate: float | None


class _Overlap(NamedTuple):
    shares: Float[Array, " L"]
    tokens: Int[Array, " L"]


def compare(lm: LM, other: LM, windows: Windows, *, progress: bool = False) -> dict[Kind, list[LayerChange]]:
    """Set overlap of the two models' selections (:func:`moejax.routing.statistics.set_overlap`), layer by layer.

    Raises:
        MoejaxError: the models differ in vocabulary, in which layers are mixtures, or in the number of experts.
    """
    mine, theirs = lm.config, other.config
    if mine.vocab_size != theirs.vocab_size:
        raise MoejaxError(f"vocabularies of {mine.vocab_size} and {theirs.vocab_size}: no two checkpoints of a model.")
    here, there = mixtures(lm.decoder), mixtures(other.decoder)
    for kind in KINDS:
        experts = [{m.layer: m.experts for m in found.get(kind, [])} for found in (here, there)]
        layers = [i for i in range(mine.num_layers) if experts[0].get(i) != experts[1].get(i)]
        if layers or mine.num_layers != theirs.num_layers:
            raise MoejaxError(
                f"{lm.name} and {other.name} are no two checkpoints of a model: {mine.num_layers} and "
                f"{theirs.num_layers} layers" + (f", other {kind} experts in layer {layers[0]}." if layers else ".")
            )
    sums = accumulate(partial(_measure, lm.flat, other.flat), windows, "comparing", progress)
    return {kind: _changes([m.layer for m in found], sums[kind]) for kind, found in here.items()}


def _changes(layers: list[int], sums: _Overlap) -> list[LayerChange]:
    found = []
    for layer, total, tokens in zip(layers, sums.shares, np.asarray(sums.tokens).tolist(), strict=True):
        overlap = float(total) / tokens if tokens else None
        found.append(LayerChange(layer, tokens, overlap, None if overlap is None else 1 - overlap))
    return found


@Program
def _measure(weights: FlatDecoder, other: FlatDecoder, batch: Batch) -> dict[Kind, _Overlap]:
    both = [unflatten(w).hidden(batch.tokens, valid=batch.valid) for w in (weights, other)]
    found = {}
    for kind in KINDS:
        pairs = zip(*(hidden.routing(kind) for hidden in both), strict=True)
        sums = []
        for here, there in pairs:
            if here is None or there is None:
                continue
            shares, counted = token_overlap(here.ids, there.ids, here.weights, there.weights)
            sound = jnp.isfinite(here.weights).all(-1) & jnp.isfinite(there.weights).all(-1)
            counted &= batch.valid & sound
            sums.append(_Overlap(jnp.where(counted, shares, 0).sum(), counted.sum(dtype=jnp.int32)))
        if sums:
            found[kind] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)
    return found
