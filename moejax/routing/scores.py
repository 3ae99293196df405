"""Scores of all experts from router logits; routers select from them. All are pure and keep the logits' dtype."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Score = Callable[[Array], Array]
"""A score: ``[*b, E]`` router logits to ``[*b, E]`` scores."""


def softmax(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """Probabilities over all experts, which sum to one (Switch Transformer, arXiv 2101.03961, eq. 1)."""
    return jax.nn.softmax(logits, axis=-1)


def sigmoid(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """A probability for each expert by itself, in (0, 1) (sigma-MoE, arXiv 2310.10837, eq. 19; DeepSeek-V3, eq. 15)."""
    return jax.nn.sigmoid(logits)


def relu(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """The positive part of each logit; an expert at zero does not run (ReMoE, arXiv 2412.14711, eq. 5)."""
    return jax.nn.relu(logits)


def same(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """The logits themselves, for routers that turn them into weights after the selection (Mixtral, GPT-OSS)."""
    return logits


SCORES: dict[str, Score] = {"softmax": softmax, "sigmoid": sigmoid, "relu": relu, "logits": same}
"""Scores by name."""


def cosine(
    x: Float[Array, "*b r"], experts: Float[Array, "E r"], temperature: Float[Array, ""] | float
) -> Float[Array, "*b E"]:
    """Logits ``cos(x, experts_e) / temperature`` in float32 or wider (X-MoE, arXiv 2204.09179, eq. 5).

    Args:
        x: tokens in the router's low-dimensional space of ``r`` numbers.
        experts: an embedding of each expert in that space.
        temperature: positive; smaller values make the router more decided.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...r,er->...e", _unit(x.astype(wide)), _unit(experts.astype(wide))) / temperature


def _unit(x: Float[Array, "*b r"]) -> Float[Array, "*b r"]:
    """The vectors scaled to length one."""
    # the floor keeps the gradient of a vector of zeros finite: a square root has no derivative at zero
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-8))


def ternary(logits: Float[Array, "*b R"], num_experts: int) -> Float[Array, "*b R"]:
    """Logits with TC-MoE's initial offsets: 0 for ``+1`` routes, -1 for ``-1`` routes, -10 for null routes.

    The routes are ``num_experts`` experts with sign ``+1``, the same experts with sign ``-1``, then null routes. The
    offsets make an untrained router select mostly ``+1`` routes, as an ordinary router would.
    """
    routes = jnp.arange(logits.shape[-1])
    return logits + jnp.where(routes < num_experts, 0.0, jnp.where(routes < 2 * num_experts, -1.0, -10.0))
