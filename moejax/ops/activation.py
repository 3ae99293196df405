"""Activations ``a(g) = g * slope(g)``, under the names that Hugging Face configs use.

This module defines slopes, because the identity rule of relevance propagation holds the slope constant.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))


def _gelu_tanh(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _relu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return (x > 0).astype(x.dtype)


SLOPES: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.sigmoid,
    "swish": jax.nn.sigmoid,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}
"""``slope(g) = a(g) / g`` of each activation."""


@jax.custom_vjp
def split_branches(x: Float[Array, "*s 2 F"]) -> tuple[Float[Array, "*s F"], Float[Array, "*s F"]]:
    """The two branches of a gated unit: gate and linear branch."""
    return x[..., 0, :], x[..., 1, :]


def _forward(x):
    return split_branches(x), None


def _backward(_, cotangents):
    gate, up = cotangents
    # a selection, because XLA's kernel for a concatenation takes twice as long
    return (jnp.where((jnp.arange(2) == 0)[:, None], gate[..., None, :], up[..., None, :]),)


split_branches.defvjp(_forward, _backward)
