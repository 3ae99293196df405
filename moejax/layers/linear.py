"""Linear map in the published layout ``[out, in]``: loading and exporting transpose nothing."""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.rules import Reading


def matmul(x: Float[Array, "*b D"], weight: Float[Array, "*m D"]) -> Float[Array, "..."]:
    """``x @ weight.T`` in the dtype of ``x``; the outputs may have several axes, ``[*b *m]``."""
    # an x of its own for every map, else XLA copies the matrices of several maps side by side to multiply once
    x, _ = jax.lax.optimization_barrier((x, jax.lax.stop_gradient(weight)))
    return jnp.tensordot(x, weight, (-1, -1))


def matmul_f32_accum(x: Float[Array, "*b D"], weight: Float[Array, "M D"]) -> Float[Array, "*b M"]:
    """``x @ weight.T`` with the result left in the accumulator's float32 (or wider, if the inputs are)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...d,md->...m", x, weight, preferred_element_type=wide)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike, std: float = 0.02) -> Float[Array, "..."]:
    """Initial weights: normal with the standard deviation that the supported families publish."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@nnx.dataclass
class Linear(nnx.Module):
    """``y = weight x + bias``; the outputs may have several axes."""

    weight: Float[Array, "*M D"] = nnx.data()
    bias: Float[Array, "*M"] | None = nnx.data(default=None)

    @classmethod
    def init(
        cls, key: PRNGKeyArray, inputs: int, outputs: int | tuple[int, ...], *, bias: bool, dtype: DTypeLike
    ) -> Self:
        """Random weights, zero bias."""
        rows = (outputs,) if isinstance(outputs, int) else outputs
        return cls(normal(key, (*rows, inputs), dtype), jnp.zeros(rows, dtype) if bias else None)

    def __call__(self, x: Float[Array, "B *s D"], reading: Reading) -> Float[Array, "B *c"]:
        return reading.linear(matmul, x, self.weight, self.bias)
