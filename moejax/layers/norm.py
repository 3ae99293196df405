"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.rules import Reading


@nnx.dataclass
class RMSNorm(nnx.Module):
    """``weight * x / sqrt(mean(x ** 2) + eps)``; the statistic in float32, the weight applied in the dtype of ``x``."""

    weight: Float[Array, " D"] = nnx.data()
    eps: float = nnx.static(default=1e-5)

    @classmethod
    def init(cls, dim: int, eps: float, dtype: DTypeLike) -> Self:
        """Unit weight."""
        return cls(jnp.ones(dim, dtype), eps)

    def __call__(self, x: Float[Array, "B *s D"], reading: Reading) -> Float[Array, "B *s D"]:
        return self.weight * reading.book("norm", lambda x: self._normalise(x, reading), x)

    def _normalise(self, x: Array, reading: Reading) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return reading.rule.norm(wide, inverse_rms).astype(x.dtype)
