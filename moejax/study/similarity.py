"""Similarity of the experts of a layer, and of the rows of its router, from the weights alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.layers import Role
from moejax.layers.parts import leaf_at
from moejax.models import Decoder
from moejax.ops.packed import Packed
from moejax.routing.statistics import expert_similarity, mean_cosine
from moejax.study.accumulators import MixtureKind, mixtures


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
    """The similarities of every mixture layer of that kind, in the order of the layers."""
    blocks = [decoder.layers[mixture.layer] for mixture in mixtures(decoder).get(kind, [])]
    return [_similarity(getattr(block, kind), block.config.half(kind).roles) for block in blocks]


def _similarity(mixture: Any, roles: Mapping[str, Role]) -> Similarity:
    """The part's experts and router by the roles of its leaves; biases do not count."""
    matrices = {role: [] for role in ("expert", "router")}
    for path, role in roles.items():
        leaf = leaf_at(mixture, path)
        # an array of a packed matrix is a part of that matrix, which is in the table itself
        packed = isinstance(leaf_at(mixture, path.rpartition(".")[0]), Packed) if "." in path else False
        if leaf is not None and not path.endswith("bias") and not packed:
            matrices[role].append(leaf)
    stacked, routers = matrices["expert"], matrices["router"]
    rows = routers[0] if routers else None
    return Similarity(
        _finite(mean_cosine(jnp.stack([*map(_products, stacked)]).sum(0))) if _several(stacked) else None,
        _finite(expert_similarity(rows)) if rows is not None and len(rows) > 1 else None,
    )


def _several(stacked: list[Any]) -> bool:
    return bool(stacked) and stacked[0].shape[0] > 1


def _finite(value: Float[Array, ""]) -> float | None:
    return float(value) if jnp.isfinite(value) else None


@jax.jit
def _products(stacked: Float[Array, "E *s"] | Packed) -> Float[Array, "E E"]:
    """Inner products of the experts' flattened matrices, accumulated in float32 without a float32 copy."""
    values = stacked.unpack(stacked.value_dtype) if isinstance(stacked, Packed) else stacked
    product = partial(jnp.tensordot, precision="highest", preferred_element_type=jnp.float32)
    axes = list(range(1, values.ndim))
    return product(values, values, axes=(axes, axes))
