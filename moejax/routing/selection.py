"""Adjusted scores for the selection (a bias, groups, dropped experts), and routing in which experts select tokens.

An adjustment maps scores ``[*b, E]`` to the scores that the selection ranks; routing weights still come from the
unadjusted scores (``adjust=`` of :func:`moejax.routing.route`). Minus infinity excludes an expert.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.errors import MoejaxError

Adjust = Callable[[Array], Array]
"""An adjustment: ``[*b, E]`` scores to the ``[*b, E]`` scores by which experts are selected."""

GroupScore = Callable[[Array], Array]
"""A group's score: ``[*b, groups, experts of a group]`` scores to ``[*b, groups]``."""


def biased(scores: Float[Array, "*b E"], bias: Float[Array, " E"]) -> Float[Array, "*b E"]:
    """Scores plus a bias that balances loads and has no gradient (Wang et al., arXiv 2408.15664, eq. 3)."""
    return scores + jax.lax.stop_gradient(bias)


def balanced_bias(bias: Float[Array, " E"], load: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """The bias after one optimiser step (Wang et al., arXiv 2408.15664, algorithm 1).

    Experts below the mean load get ``+ rate``, experts above it ``- rate``. Without any load nothing changes.

    Args:
        load: routed slots of each expert over the whole batch of the step, all devices and all micro-batches.
        rate: the size of a step, in units of the scores.
    """
    mean = load.mean()
    # where loads are fractions, a difference within rounding of the mean is balance
    return bias + rate * jnp.where(jnp.abs(mean - load) > 1e-6 * mean, jnp.sign(mean - load), 0)


def best_sum(by_group: Float[Array, "*b n m"], best: int = 2) -> Float[Array, "*b n"]:
    """Sum of the ``best`` highest scores (at most ``m``) of each of ``n`` groups of ``m`` experts."""
    return jax.lax.top_k(by_group, min(best, by_group.shape[-1]))[0].sum(-1)


def best_score(by_group: Float[Array, "*b n m"]) -> Float[Array, "*b n"]:
    """The highest score of each of ``n`` groups of ``m`` experts."""
    return by_group.max(-1)


GROUP_SCORES: dict[str, GroupScore] = {"max": best_score, "top2": best_sum}
"""Scores of groups by name: ``"max"`` as in DeepSeek-V2 (arXiv 2405.04434, section 2.1.2), ``"top2"`` (the sum of the
two highest) as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)."""


def group_limited(
    scores: Float[Array, "*b E"], groups: int, kept: int, group_score: str | GroupScore = "top2"
) -> Float[Array, "*b E"]:
    """Scores with minus infinity outside of each token's ``kept`` best groups of experts.

    Experts ``0 .. E / groups - 1`` are the first group, and so on. Ties between groups go to the lower group.

    Args:
        groups: number of groups; it divides ``E``.
        kept: groups from which a token may select, at most ``groups``.
        group_score: a name in :data:`GROUP_SCORES`, or a function ``[*b, groups, E / groups] -> [*b, groups]``.

    Raises:
        MoejaxError: the groups do not divide the experts, ``kept`` is out of range, or the name is unknown.
    """
    experts = scores.shape[-1]
    if groups < 1 or experts % groups or not 1 <= kept <= groups:
        raise MoejaxError(f"cannot keep {kept} of {groups} groups of {experts} experts.")
    if isinstance(group_score, str) and group_score not in GROUP_SCORES:
        raise MoejaxError(f"group_score={group_score!r} is unknown; choose from {', '.join(GROUP_SCORES)}.")
    score = GROUP_SCORES[group_score] if isinstance(group_score, str) else group_score
    by_group = scores.reshape(*scores.shape[:-1], groups, -1)
    inside = selected(jax.lax.top_k(score(by_group), kept)[1], groups)
    return jnp.where(inside[..., None], by_group, -jnp.inf).reshape(scores.shape)


def limit_groups(scores: Float[Array, "*b E"], groups: int, kept: int, best: int = 2) -> Float[Array, "*b E"]:
    """:func:`group_limited` with the sum of the ``best`` highest scores as the score of a group."""
    return group_limited(scores, groups, kept, partial(best_sum, best=best))


def drop_experts(
    scores: Float[Array, "*b E"], key: PRNGKeyArray, rate: float, num_selected: int
) -> Float[Array, "*b E"]:
    """Scores with minus infinity for randomly dropped experts, the same for all tokens (arXiv 2310.10837, sec. 5).

    Args:
        rate: probability with which an expert is dropped, in [0, 1].
        num_selected: experts that always remain, whatever the draw.
    """
    experts = scores.shape[-1]
    draw = jax.random.uniform(key, (experts,))
    order = jnp.argsort(jnp.argsort(-draw))
    return jnp.where((draw >= rate) | (order < num_selected), scores, -jnp.inf)


def expert_choice(
    scores: Float[Array, "T E"], capacity: int, mask: Bool[Array, " T"] | None = None
) -> Bool[Array, "T E"]:
    """True where an expert selects a token: each takes its ``capacity`` best (Zhou et al., arXiv 2202.09368, eq. 2).

    Masked tokens are never selected. A token's experts depend on all other tokens, later ones included, so a model that
    routes this way is not causal.
    """
    seen = scores if mask is None else jnp.where(mask[:, None], scores, -jnp.inf)
    best = jax.lax.top_k(seen.T, min(capacity, len(scores)))[1]
    chosen = selected(best, len(scores)).T
    return chosen if mask is None else chosen & mask[:, None]


def selected(ids: Int[Array, "*b K"], experts: int) -> Bool[Array, "*b E"]:
    """True for each expert that is among the ids; an id outside of ``0 .. experts - 1`` selects no expert."""
    return (ids[..., None] == jnp.arange(experts)).any(-2)
