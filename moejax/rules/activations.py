"""A rule that reads activations at the gates in place of relevance: norms of experts and attention patterns."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.ops.cotangents import accumulation_dtype, attach
from moejax.rules.plain import Plain
from moejax.rules.rule import AttentionProduct, Total, over_slots


@dataclass(frozen=True)
class Activations(Plain):
    """Read the output norm at the gate of a routed slot and the attention weight at an edge, whatever the target."""

    @property
    def leaks(self) -> frozenset[str]:
        return frozenset()

    def combine(self, terms: Float[Array, "*b K D"], total: Total = over_slots) -> Float[Array, "*b D"]:
        """Each term receives its own direction as cotangent: the product of both is the term's norm."""
        return total(_along_themselves(terms))

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        """Values are ones, and a head's cotangent sums to one: the cotangent of the pattern is one everywhere."""
        q, k = stop_gradient(q), stop_gradient(k)
        return attach(stop_gradient(product(q, k, v)), _one_in_all(product(q, k, jnp.ones_like(v))))


@jax.custom_vjp
def _along_themselves(terms: Float[Array, "*b K D"]) -> Float[Array, "*b K D"]:
    """Return ``terms``; in the backward pass replace each cotangent by the direction of its term."""
    return terms


def _forward(terms):
    return terms, terms


def _backward(terms, _):
    wide = terms.astype(accumulation_dtype(terms))
    norm = jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return ((wide / jnp.where(norm == 0, 1, norm)).astype(terms.dtype),)


_along_themselves.defvjp(_forward, _backward)


@jax.custom_vjp
def _one_in_all(heads: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """Return ``heads``; in the backward pass replace each head's cotangent by ``1 / C`` in every place."""
    return heads


_one_in_all.defvjp(
    lambda heads: (heads, None), lambda _, cotangent: (jnp.full_like(cotangent, 1 / cotangent.shape[-1]),)
)
