"""Where numbers stop being numbers: the first layer, node and weights that are NaN or infinite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moejax.errors import CheckpointError
from moejax.models.activations import checked_apply
from moejax.models.config import split_path
from moejax.models.decoder import Decoder
from moejax.models.flat import FlatDecoder, unflatten
from moejax.models.node_table import node_names
from moejax.rules import Edits, Gates

_WITHIN = ("attention_norm", "attention", "middle", "feed_forward_norm", "router_logits", "feed_forward")
"""The nodes of a layer that are looked at, in the order in which they are computed; all are small."""


def first_not_finite(
    weights: Decoder | FlatDecoder,
    tokens: Int[np.ndarray, "B T"],
    valid: Bool[np.ndarray, "B T"] | None = None,
    gates: Gates | None = None,
    edits: Edits | None = None,
) -> str:
    """Say where the first value that is NaN or infinite appears in a forward pass, and which weights are.

    This runs the pass again, with the residual stream of every layer; call it once it is known that something is wrong.
    """
    options = {"valid": valid, "gates": gates, "edits": edits}
    layers = weights.config.num_layers

    def bad_of(names: list[str]) -> list[str]:
        values = checked_apply(weights, tokens, names=names, **options)[1]
        return [name for name in names if not _is_finite(values[name], valid)]

    bad = [int(name.removeprefix("stream.")) for name in bad_of([f"stream.{layer}" for layer in range(layers + 1)])]
    first = bad[0] - 1 if bad else layers
    if first in (-1, layers):
        part = "the embedding" if first < 0 else "the final norm or the head"
        return f"the first NaN or infinite values appear in {part}{_culprits(weights, None)}"
    known = set(node_names(weights.config, f"*.{first}"))
    named = bad_of([f"{name}.{first}" for name in _WITHIN if f"{name}.{first}" in known])
    at = f", at {named[0]!r}" if named else ""
    return f"the first NaN or infinite values appear in layer {first}{at}{_culprits(weights, first)}"


def check_leaves(weights: Decoder | FlatDecoder, name: str) -> None:
    """Raise ``CheckpointError`` if a weight of the model ``name`` is not finite."""
    if bad := next(bad_leaves(weights), None):
        path, count = bad
        raise CheckpointError(f"{name}: {count} values of {path} are NaN or infinite; it is the first such tensor.")


def bad_leaves(weights: Decoder | FlatDecoder) -> Iterator[tuple[str, int]]:
    """Yield the path of each leaf with NaN or infinite values, in the tree's order, and how many it has."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(unflatten(weights)):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (count := int(_count(leaf))):
            yield jax.tree_util.keystr(path, simple=True, separator="."), count


@jax.jit
def _count(leaf: Array) -> Int[Array, ""]:
    return jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32)


def _is_finite(values: Array, valid: Any) -> bool:
    """Return whether all values of real tokens are finite."""
    finite = jnp.isfinite(values).reshape(*values.shape[:2], -1).all(-1)
    return bool((finite if valid is None else finite | ~jnp.asarray(valid, bool)).all())


def _culprits(weights: Decoder | FlatDecoder, layer: int | None) -> str:
    """Name the weights of a layer, or those outside of all, that are not finite."""
    found = [f"{path} ({count} values)" for path, count in bad_leaves(weights) if split_path(path)[0] == layer]
    return f"; not finite are the weights {', '.join(found[:3])}" if found else ""
