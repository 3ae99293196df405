"""Auxiliary losses of router training, in float32 or wider.

Masks are true for tokens that count and false for padding; a loss over no token is zero. Inside ``jax.shard_map``,
``axis_name`` sums over the devices of a mapped axis. Under ``jit`` alone leave it out: arrays are global there, however
they are sharded.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.routing.core import Routing
from moejax.routing.statistics import entropy, masked_mean, wide

Mask = Bool[Array, "*b"] | None
Scope = Literal["sequence", "batch", "global"]
Count = Literal["selected", "first"]
Over = Literal["token", "sequence", "global"]


def balance_loss(
    routing: Routing,
    mask: Mask = None,
    *,
    scope: Scope = "batch",
    count: Count = "selected",
    factors: Float[Array, " E"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Load-balancing loss ``E * sum_e t_e f_e P_e`` (Switch Transformer, arXiv 2101.03961, eq. 4, for top-k).

    ``f_e`` is the fraction of routed slots that expert ``e`` received, ``P_e`` its mean score. The loss is 1 at perfect
    balance if each token's scores sum to one.

    Args:
        scope: tokens over which ``f`` and ``P`` are taken: one ``"sequence"`` (the last but one axis of the scores; the
            loss is then the mean over sequences that have a token), the ``"batch"``, or the batches of all devices
            (``"global"``, needs ``axis_name``).
        count: slots that count: all ``"selected"``, or the ``"first"`` of each token.
        factors: ``t_e``, by default ones (MoE++, arXiv 2410.07348, eq. 9).
        axis_name: mapped axis over which a global loss sums.

    Raises:
        ValueError: an unknown scope or count, or a global scope without ``axis_name``.
    """
    _known("scope", scope, Scope)
    _known("count", count, Count)
    if (scope == "global") != (axis_name is not None):
        raise ValueError("scope='global' and axis_name belong together; under jit alone use scope='batch'.")
    scores = wide(routing.scores)
    chosen = jax.lax.stop_gradient(slot_shares(routing, count))
    axes = (-2,) if scope == "sequence" else tuple(range(scores.ndim - 1))
    f, p = (mean_over(values, mask, axes, axis_name) for values in (chosen, scores))
    per_set = scores.shape[-1] * (f * p if factors is None else factors * f * p).sum(-1)
    if per_set.ndim == 0 or mask is None:
        return per_set.mean()
    return mean_over(per_set, mask.any(-1), tuple(range(per_set.ndim)))


def slot_shares(routing: Routing, count: Count = "selected") -> Float[Array, "*b E"]:
    """Fraction of a token's slots that each expert fills; an empty slot (weight 0) does not count.

    A token's fractions sum to one if all slots count, and to less if some are empty.
    """
    ids, weights = (routing.ids, routing.weights) if count == "selected" else (routing.ids[..., :1], None)
    wide = jnp.promote_types(routing.scores.dtype, jnp.float32)
    chosen = (ids[..., None] == jnp.arange(routing.scores.shape[-1])).astype(wide)
    return (chosen if weights is None else jnp.where((weights != 0)[..., None], chosen, 0)).mean(-2)


def z_loss(routing: Routing, mask: Mask = None) -> Float[Array, ""]:
    """Router z-loss: mean of ``logsumexp(logits) ** 2`` (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return masked_mean(jax.nn.logsumexp(wide(routing.logits), axis=-1) ** 2, mask)


def entropy_loss(
    probabilities: Float[Array, "*b E"], mask: Mask = None, *, over: Over = "global", axis_name: str | None = None
) -> Float[Array, ""]:
    """Minus the entropy, in nats, of the tokens' mean distribution (sigma-MoE, arXiv 2310.10837, eq. 20-21).

    Args:
        probabilities: each token's distribution over the experts.
        over: tokens whose distributions are averaged: a single ``"token"`` (this penalises decided routing), a
            ``"sequence"``, or all (``"global"``).

    Raises:
        ValueError: ``over`` is unknown.
    """
    _known("over", over, Over)
    p = wide(probabilities)
    if over != "token":
        axes = (-2,) if over == "sequence" else tuple(range(p.ndim - 1))
        p = mean_over(p, mask, axes, axis_name)
        mask = mask.any(-1) if over == "sequence" and mask is not None else None
    return -masked_mean(entropy(p), mask)


def mutual_information_loss(probabilities: Float[Array, "*b E"], mask: Mask = None) -> Float[Array, ""]:
    """``H(E | token) - H(E)`` in nats: minus the mutual information of token and expert (Mod-Squad, 2212.08066)."""
    p = wide(probabilities)
    return masked_mean(entropy(p), mask) - entropy(mean_over(p, mask, tuple(range(p.ndim - 1))))


def cv_squared_loss(amounts: Float[Array, " E"]) -> Float[Array, ""]:
    """Squared coefficient of variation of the experts' loads or summed weights (Shazeer et al., 1701.06538, eq. 6)."""
    amounts = wide(amounts)
    mean = amounts.mean()
    return jnp.where(mean == 0, 0, amounts.var() / jnp.where(mean == 0, 1, mean) ** 2)


def null_reward(probabilities: Float[Array, "*b Z"], mask: Mask = None) -> Float[Array, ""]:
    """Minus the mean total probability of the Z null routes: a reward for sparsity (TC-MoE)."""
    return -masked_mean(wide(probabilities).sum(-1), mask)


def mean_over(
    values: Float[Array, "..."], mask: Mask, axes: tuple[int, ...], axis_name: str | None = None
) -> Float[Array, "..."]:
    """Mean of the unmasked entries over some axes; the axes of the mask are the first axes of the values."""
    if mask is None:
        mean = values.mean(axes)
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)
    mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
    total, count = jnp.where(mask, values, 0).sum(axes), mask.sum(axes)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def _known(name: str, value: str, kinds: object) -> None:
    """Raise ValueError unless ``value`` is one of the values of the Literal ``kinds``."""
    if value not in get_args(kinds):
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(get_args(kinds))}.")
