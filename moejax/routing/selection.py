"""What a selection looks at: scores that are biased, limited to groups or thinned out; and experts that choose."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Adjust = Callable[[Array], Array]


def biased(scores: Float[Array, "*b E"], bias: Float[Array, " E"]) -> Float[Array, "*b E"]:
    """Scores with a bias that balances loads and has no gradient (Wang et al., arXiv 2408.15664, eq. 3)."""
    return scores + jax.lax.stop_gradient(bias)


def balanced_bias(bias: Float[Array, " E"], load: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """The bias after one optimiser step: ``+ rate`` for experts below the mean load, ``- rate`` above (algorithm 1).

    ``load`` counts slots over the whole batch of the step, all devices and all micro-batches. Without any slot
    nothing changes.
    """
    mean = load.mean()
    # of loads that are shares, the mean's rounding is no lack
    return bias + rate * jnp.where(jnp.abs(mean - load) > 1e-6 * mean, jnp.sign(mean - load), 0)


def limit_groups(scores: Float[Array, "*b E"], groups: int, kept: int, best: int = 2) -> Float[Array, "*b E"]:
    """Scores with minus infinity outside of the ``kept`` best groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    A group's rank is the sum of its ``best`` highest scores. Experts of a group stand side by side.
    """
    by_group = scores.reshape(*scores.shape[:-1], groups, -1)
    rank = jax.lax.top_k(by_group, min(best, by_group.shape[-1]))[0].sum(-1)
    inside = selected(jax.lax.top_k(rank, kept)[1], groups)
    return jnp.where(inside[..., None], by_group, -jnp.inf).reshape(scores.shape)


GROUP_SCORES = {"top2": lambda s: jax.lax.top_k(s, min(2, s.shape[-1]))[0].sum(-1), "max": lambda s: s.max(-1)}


def group_limited(scores: Float[Array, "*b E"], groups: int, kept: int, group_score: str) -> Float[Array, "*b E"]:
    """TEMPORARY."""
    by_group = scores.reshape(*scores.shape[:-1], groups, -1)
    inside = selected(jax.lax.top_k(GROUP_SCORES[group_score](by_group), kept)[1], groups)
    return jnp.where(inside[..., None], by_group, -jnp.inf).reshape(scores.shape)


def drop_experts(
    scores: Float[Array, "*b E"], key: PRNGKeyArray, rate: float, num_selected: int
) -> Float[Array, "*b E"]:
    """Scores with minus infinity for experts left out at random, the same for all tokens (arXiv 2310.10837, sec. 5).

    At least ``num_selected`` experts are left, whatever the draw.
    """
    experts = scores.shape[-1]
    draw = jax.random.uniform(key, (experts,))
    order = jnp.argsort(jnp.argsort(-draw))
    return jnp.where((draw >= rate) | (order < num_selected), scores, -jnp.inf)


def expert_choice(
    scores: Float[Array, "N E"], capacity: int, mask: Bool[Array, " N"] | None = None
) -> Bool[Array, "N E"]:
    """Where each expert takes its ``capacity`` best tokens (Zhou et al., arXiv 2202.09368, eq. 2); never masked ones.

    What a token gets so depends on all the others, later ones among them: a model that routes so is not causal.
    """
    seen = scores if mask is None else jnp.where(mask[:, None], scores, -jnp.inf)
    best = jax.lax.top_k(seen.T, min(capacity, len(scores)))[1]
    chosen = selected(best, len(scores)).T
    return chosen if mask is None else chosen & mask[:, None]


def selected(ids: Int[Array, "*b K"], experts: int) -> Bool[Array, "*b E"]:
    """Whether each expert is among the ids; ids outside of ``0 .. experts - 1`` stand for none."""
    return (ids[..., None] == jnp.arange(experts)).any(-2)
