"""Activations of the form ``a(g) = g * slope(g)``, named as Hugging Face configs name them.

Written by their slope because the identity rule of relevance propagation is the slope held constant.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array

SLOPES: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.sigmoid, "swish": jax.nn.sigmoid}
