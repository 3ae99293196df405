"""Modules that are given as experts, of every kind, and a registered layer that has such experts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from moejax import MoeLayer


class FeedForward(nnx.Module):
    """A norm between two linear maps."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 9, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(inputs, hidden, rngs=rngs)
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.norm(self.up(x))))


class Linen(linen.Module):
    """The same in flax.linen, without the norm."""

    outputs: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(self.outputs)(jax.nn.gelu(linen.Dense(9)(x)))


class Plain:
    """A class that knows nothing of JAX's trees."""

    def __init__(self, inputs: int, outputs: int, seed: int = 0) -> None:
        self.weight = np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)
        self.scale = 2.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * jnp.tanh(x @ self.weight)


class ModuleMoE(MoeLayer):
    """A layer in a decoder whose experts are modules."""

    def __init__(
        self,
        in_embed_dim: int = 768,
        out_embed_dim: int = 768,
        num_of_experts: int = 4,
        num_selected: int = 2,
        expert: Any = None,
        args: Any = None,
    ) -> None:
        expert = expert or partial(FeedForward, in_embed_dim, out_embed_dim)
        super().__init__(in_embed_dim, out_embed_dim, num_of_experts, num_selected, expert, args)
