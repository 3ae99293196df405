"""Scores of all experts, from which routers select."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Score = Callable[[Array], Array]


def softmax(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """Probabilities (Switch Transformer, arXiv 2101.03961, eq. 1)."""
    return jax.nn.softmax(logits, axis=-1)


def sigmoid(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """Each expert's own probability, without competition (sigma-MoE, arXiv 2310.10837, eq. 19; DeepSeek-V3, eq. 15)."""
    return jax.nn.sigmoid(logits)


def relu(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """Zero for every expert that is not wanted (ReMoE, arXiv 2412.14711, eq. 5)."""
    return jax.nn.relu(logits)


def same(logits: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    """The logits themselves, for routers that turn them into weights after the selection (Mixtral, GPT-OSS)."""
    return logits


SCORES: dict[str, Score] = {"softmax": softmax, "sigmoid": sigmoid, "relu": relu, "logits": same}
"""Scores of all experts from router logits, by name."""


def cosine(
    x: Float[Array, "*b r"], experts: Float[Array, "E r"], temperature: Float[Array, ""] | float
) -> Float[Array, "*b E"]:
    """Logits ``cos(x, experts_e) / temperature`` in float32 or wider (X-MoE, arXiv 2204.09179, eq. 5)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...r,er->...e", _unit(x.astype(wide)), _unit(experts.astype(wide))) / temperature


def _unit(x: Float[Array, "*b r"]) -> Float[Array, "*b r"]:
    # the square root has no derivative at zero, where a dead input would stand
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-8))


def ternary(logits: Float[Array, "*b R"], num_experts: int) -> Float[Array, "*b R"]:
    """Logits of the routes ``(+1 x E, -1 x E, 0 x the rest)`` with the offsets 0, -1 and -10 of TC-MoE.

    An untrained router so begins with the positive choices, as an ordinary one.
    """
    routes = jnp.arange(logits.shape[-1])
    return logits + jnp.where(routes < num_experts, 0.0, jnp.where(routes < 2 * num_experts, -1.0, -10.0))
