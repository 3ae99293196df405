"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in transformers."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
    """Cosine and sine, in float32, of position times ``theta ** (-2 i / head_dim)``, repeated for both halves."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T H C"], cosine: Float[Array, "B T C"], sine: Float[Array, "B T C"]
) -> Float[Array, "B T H C"]:
    """Rotate each pair ``(x[i], x[i + C/2])`` by its angle; linear in ``x``, computed in its dtype."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cosine[:, :, None].astype(x.dtype) + turned * sine[:, :, None].astype(x.dtype)
