"""Tiny registered layers with random parameters far from their initial values, and a compiled view of their calls.

Sizes all differ: B=2, K=3, F=4, T=5, E=6, D=7, and O=9, the output's width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from layers.reference import ALPHA, BETA, GROUPS, KEPT_GROUPS, LIBMOE, PUBLISHED, REWARD, SCALE

from moejax import MoeLayer, get_moe
from moejax.layers.feed_forward.registry import registered

B, K, F, T, E, D, O = 2, 3, 4, 5, 6, 7, 9  # noqa: E741

SETTINGS: dict[str, dict[str, Any]] = {
    "smoe_tcmoe": {"reward_coef": REWARD},
    "smoe_sharev3": {"num_groups": GROUPS, "num_selected_groups": KEPT_GROUPS, "routed_scaling_factor": SCALE},
}
CASES = [(name, None) for name in PUBLISHED] + [(name, "libmoe") for name in LIBMOE]
"""Every variant as published and, where LibMoE has it, as LibMoE computes it."""


def built_in() -> list[str]:
    """Names of the library's own variants."""
    return [name for name, layer in registered().items() if layer.__module__.startswith("moejax.")]


def settings(name: str, compat: str | None, **more: Any) -> dict[str, Any]:
    """Settings of a variant as published, or as LibMoE has it."""
    fields = {"balance_loss_coef": ALPHA, "router_z_loss_coef": BETA, "expert_dim": F, "compat": compat}
    if compat is None or name != "smoe_sharev3":
        fields |= SETTINGS.get(name, {})
    return fields | more


def make(name: str, compat: str | None = None, *, seed: int = 0, sizes: tuple[int, ...] = (), **more: Any) -> MoeLayer:
    """A random layer, in float64 under the fixture ``x64``, else in float32; ``sizes`` are ``(D, O, E, K)``."""
    d, o, e, k = sizes or (D, D if name == "smoe_plus_plus" else O, E, K)
    # only shapes are computed: drawing initial weights that are thrown away would compile for seconds
    return randomised(jax.eval_shape(lambda: get_moe(name)(d, o, e, k, args=settings(name, compat, **more))), seed)


def randomised(layer: MoeLayer, seed: int = 0) -> MoeLayer:
    """The layer with random parameters."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        std = 0.3 if leaf.ndim == 0 or "selection_bias" in name else 1.0
        values = rng.normal(0, std, leaf.shape)
        if "router.weight" in name and len(values) == 2 * E + K:
            values[2 * E :] *= 6  # larger than their offset, so that null routes are selected too
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, layer)


def parameters(layer: MoeLayer) -> dict[str, np.ndarray]:
    """Parameters in float64 by their dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(layer)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(leaf, np.float64) for p, leaf in leaves}


def tokens(seed: int = 1, shape: tuple[int, ...] = (B, T, D)) -> np.ndarray:
    """Random inputs of a layer."""
    return np.random.default_rng(seed).normal(size=shape)


def some_mask() -> np.ndarray:
    """A mask ``[B T]`` under which three tokens are padding."""
    mask = np.ones((B, T), bool)
    mask[0, 3:] = mask[1, 0] = False
    return mask


@jax.jit
def objective(layer: MoeLayer, x: jax.Array, cotangent: jax.Array, mask: jax.Array) -> Any:
    """Return ``[sum(output * cotangent), auxiliary]``, the results of the call, and gradients of both sums.

    Gradients are taken in the layer and in the tokens. One program of a variant serves values, masks and gradients.
    """

    def value(layer: MoeLayer, x: jax.Array) -> Any:
        results = layer(x, return_id_experts=True, mask=mask)
        return jnp.stack([(results[0] * cotangent).sum(), results[1]]), results

    both, pull, results = jax.vjp(value, layer, x, has_aux=True)
    return both, results, jax.vmap(pull)(jnp.eye(2, dtype=both.dtype))


def call(layer: MoeLayer, x: np.ndarray, mask: np.ndarray | None = None) -> Any:
    """Return the results of the layer's call: output, auxiliary loss, and the rest."""
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    return objective(layer, jnp.asarray(x), jnp.zeros((*x.shape[:2], layer.out_embed_dim)), jnp.asarray(mask))[1]
