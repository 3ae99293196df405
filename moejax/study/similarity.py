"""Similarity of the experts of a layer, and of the rows of its router, from the weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.models import Decoder
from moejax.ops.mxfp4 import MXFP4
from moejax.routing.statistics import expert_similarity, mean_cosine
from moejax.study.accumulators import MixtureKind, mixtures

_STACKED = ("experts.input", "experts.output", "query", "output")
"""Matrices of a mixture's experts, stacked on their first axis: feed-forward, and attention's."""

_ROUTERS = ("router.linear.weight", "gate_weight")
"""Matrices of routers, a row for each route."""


@dataclass(frozen=True)
class Similarity:
    """Mean pairwise cosines in [-1, 1]; ``None`` for a single expert, an absent weight, or one that is not finite.

    Attributes:
        experts: cosine between experts, each the concatenation of its flattened matrices.
        router: cosine between the router's rows, one for each route.
    """

    experts: float | None
    router: float | None


def similarities(decoder: Decoder, kind: MixtureKind = "feed_forward") -> list[Similarity]:
    """The similarity in every mixture layer of that kind, in the order of the layers."""
    return [_similarity(getattr(decoder.layers[m.layer], kind)) for m in mixtures(decoder).get(kind, [])]


def _similarity(mixture: Any) -> Similarity:
    stacked, routers = _found(mixture, _STACKED), _found(mixture, _ROUTERS)
    rows = routers[0] if routers else None
    return Similarity(
        _finite(mean_cosine(jnp.stack([*map(_products, stacked)]).sum(0))) if _several(stacked) else None,
        _finite(expert_similarity(rows)) if rows is not None and len(rows) > 1 else None,
    )


def _found(mixture: Any, names: Sequence[str]) -> list[Any]:
    """The attributes of those names that exist; a dot leads into a part."""
    values = [reduce(lambda part, name: getattr(part, name, None), name.split("."), mixture) for name in names]
    return [value for value in values if value is not None]


def _several(stacked: list[Any]) -> bool:
    return bool(stacked) and stacked[0].shape[0] > 1


def _finite(value: Float[Array, ""]) -> float | None:
    return float(value) if jnp.isfinite(value) else None


@jax.jit
def _products(stacked: Float[Array, "E *s"] | MXFP4) -> Float[Array, "E E"]:
    """Inner products of the experts' flattened matrices, accumulated in float32 without a float32 copy."""
    values = stacked.unpack(jnp.bfloat16) if isinstance(stacked, MXFP4) else stacked
    product = partial(jnp.tensordot, precision="highest", preferred_element_type=jnp.float32)
    axes = list(range(1, values.ndim))
    return product(values, values, axes=(axes, axes))
