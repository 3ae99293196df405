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
        return self.weight * self._normed(x, reading, x.dtype)

    def _normed(self, x: Float[Array, "B *s D"], reading: Reading, dtype: DTypeLike) -> Float[Array, "B *s D"]:
        """``x`` divided by its root mean square, computed in float32 or wider."""

        def normalise(x: Array) -> Array:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
            return reading.rule.norm(wide, inverse_rms).astype(dtype)

        return reading.book("norm", normalise, x)


@nnx.dataclass
class WideRMSNorm(RMSNorm):
    """RMSNorm whose weight is applied in float32 too, before the result is cast (AFMoE, Nemotron-H, Gemma 4)."""

    def __call__(self, x: Float[Array, "B *s D"], reading: Reading) -> Float[Array, "B *s D"]:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (self.weight.astype(wide) * self._normed(x, reading, wide)).astype(x.dtype)
