"""Weights as 8-bit integers with one scale for each row: ``weight[.., o, d] = row_scales[.., o] * codes[.., o, d]``.

Rounding is symmetric and to the nearest: the largest absolute value of a row becomes 127, zero stays zero. A row is an
output channel of a matrix ``[out, in]``. The format is lossy, and no checkpoint has it: it is made when a model is
loaded. What a step computes with are the values of :meth:`Int8.unpack`, in the dtype of the step, in the forward pass
and in every backward pass alike. So results are those of a model whose weights are these values.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray
from jaxtyping import Int8 as Int8Array

from moejax.ops.packed import Axes, Packed, register_format

LARGEST = 127
"""The largest code; -128 is not used, so that codes are symmetric."""


@register_format("int8")
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Packed):
    """An array of shape ``[*s, D]`` with 8 bits a value and a float32 scale for each row.

    Attributes:
        codes: integers from -127 to 127.
        row_scales: the value of code 1 in each row.
    """

    value_dtype: ClassVar[Any] = jnp.float32
    is_published: ClassVar[bool] = False

    codes: Int8Array[Array, "*s D"]
    row_scales: Float32[Array, "*s"]

    @classmethod
    def of(cls, values: Float[Array, "*s D"]) -> Self:
        """Quantise; a row with a NaN or an infinite value becomes NaN throughout."""
        wide = values.astype(jnp.float32)
        row_scales = jnp.abs(wide).max(-1) / LARGEST
        # a row of zeros has scale zero
        steps = wide / jnp.where(row_scales == 0, 1, row_scales)[..., None]
        codes = jnp.round(steps).clip(-LARGEST, LARGEST)
        finite = jnp.isfinite(row_scales)
        codes = jnp.where(finite[..., None], codes, 0).astype(jnp.int8)
        return cls(codes, jnp.where(finite, row_scales, jnp.nan))

    @classmethod
    def random(cls, key: PRNGKeyArray, shape: tuple[int, ...]) -> Self:
        """Uniform codes, and one scale with which their standard deviation is 0.02."""
        codes = jax.random.randint(key, shape, -LARGEST, LARGEST + 1, jnp.int8)
        return cls(codes, jnp.full(shape[:-1], 0.02 * 3**0.5 / LARGEST, jnp.float32))

    @classmethod
    def leaf_axes(cls, axes: Axes) -> dict[str, Axes]:
        return {"codes": axes, "row_scales": axes[:-1]}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __abs__(self) -> Self:
        return type(self)(jnp.abs(self.codes), self.row_scales)

    def unpack(self, dtype: DTypeLike) -> Float[Array, "*s D"]:
        """The products of code and scale, in float32, rounded to ``dtype``."""
        return (self.codes.astype(jnp.float32) * self.row_scales[..., None]).astype(dtype)
