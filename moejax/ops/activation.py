"""Activations of the form ``a(g) = g * slope(g)``, named as Hugging Face configs name them.

Written by their slope because the identity rule of relevance propagation is the slope held constant.
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
