"""What a rule is: one method for every place where relevance propagation differs from calculus."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.rules.primitives import elementwise

Weight = Array | Any
"""A matrix, a stack of them, or a packed form of either that the product itself unpacks."""

MatMul = Callable[[Array, Weight], Array]
Slope = Callable[[Array], Array]
Total = Callable[[Float[Array, "*b K D"]], Float[Array, "*b D"]]


def over_slots(terms: Float[Array, "*b K D"]) -> Float[Array, "*b D"]:
    """The sum over slots that are all at hand."""
    return terms.sum(-2)


@runtime_checkable
class AttentionProduct(Protocol):
    """``softmax(q k^T * scale / temperature) v`` under the layer's mask, its sinks divided by the temperature too."""

    def __call__(self, q: Array, k: Array, v: Array, temperature: float = 1.0) -> Array: ...


def activate(slope: Slope, gate: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``gate * slope(gate)``, computed in float32 and returned in the dtype of ``gate``."""
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return (wide * slope(wide)).astype(gate.dtype)


@dataclass(frozen=True)
class Rule:
    """How cotangents flow back through the places where relevance may differ from calculus.

    A rule never changes a value: every method returns what ordinary calculus returns, to the bit. This base class *is*
    ordinary calculus. A new rule is a subclass that overrides the methods it treats differently, and names in ``leaks``
    the operations at which it does not conserve relevance. Rules are hashable and static under ``jit``.
    """

    @property
    def leaks(self) -> frozenset[str]:
        """Operations whose relevance out differs from their relevance in; the ledger books the difference by name.

        Names: ``norm``, ``activation``, ``clamp``, ``softmax`` (attention, from queries, keys and values to heads),
        ``router`` (from router logits and expert outputs to weighted expert outputs), ``bias``.
        """
        return frozenset({"norm", "activation", "clamp", "softmax", "router", "bias"})

    def norm(self, x: Float[Array, "*b D"], inverse_rms: Float[Array, "*b 1"]) -> Float[Array, "*b D"]:
        """Normalisation before its weight: ``x * inverse_rms``, where ``inverse_rms`` is a function of ``x``."""
        return x * inverse_rms

    def gated(
        self,
        slope: Slope,
        gate: Float[Array, "*s"],
        up: Float[Array, "*s"],
        offset: float = 0.0,
        limit: float | None = None,
    ) -> Float[Array, "*s"]:
        """Gated activation ``a(gate) * (up + offset)``, where ``a(g) = g * slope(g)`` (SiLU: the sigmoid).

        Its branches are :meth:`limited` before. A limit that the ledger books is none here.
        """

        def unit(gate: Array, up: Array) -> Array:
            gate, up = self.limited(gate, up, limit)
            return activate(slope, gate) * (up + offset)

        return elementwise(unit, gate, up)

    def limited(
        self, gate: Float[Array, "*s"], up: Float[Array, "*s"], limit: float | None
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        """The gate limited from above and the linear branch on both sides, as :meth:`clamp` does (GPT-OSS)."""
        if limit is None:
            return gate, up
        return self.clamp(gate, -math.inf, limit), self.clamp(up, -limit, limit)

    def activation(self, slope: Slope, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Activation ``a(x) = x * slope(x)`` of a unit without a gate."""
        return activate(slope, x)

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G C"],
    ) -> Float[Array, "B T H C"]:
        """Heads from queries, keys and values; ``product`` is the kernel, whichever computes it."""
        return product(q, k, v)

    def mix(self, weights: Float[Array, "*b K"], outputs: Float[Array, "*b K D"]) -> Float[Array, "*b K D"]:
        """Routing weight times expert output, for each routed slot and before their sum."""
        return weights[..., None] * outputs

    def clamp(self, x: Float[Array, "*s"], low: float, high: float) -> Float[Array, "*s"]:
        """``x`` limited to ``[low, high]``."""
        return jnp.clip(x, low, high)

    def combine(self, terms: Float[Array, "*b K D"], total: Total = over_slots) -> Float[Array, "*b D"]:
        """Sum of the routed slots' weighted outputs.

        Args:
            total: computes it, over all devices that have some. Whatever is returned, or stands in for it on the way
                back, must have passed through ``total``.
        """
        return total(terms)

    def linear(
        self,
        matmul: MatMul,
        x: Float[Array, "*b D"],
        weight: Weight,
        bias: Float[Array, "*c"] | None = None,
        slope: Slope | None = None,
    ) -> Float[Array, "*c"]:
        """``matmul(x, weight) + bias``; dense, per-expert and head products all come through here.

        Args:
            matmul: linear in both its arguments.
            bias: of the product's shape.
            slope: that of the activation which the product enters: of a unit's first product, whose last axes are its
                branches (gate and linear branch, or one without a gate) and their units.
        """
        y = matmul(x, weight)
        return y if bias is None else y + bias

    def add(self, stream: Float[Array, "*b D"], branch: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """The residual sum."""
        return stream + branch


@dataclass(frozen=True)
class Plain(Rule):
    """Ordinary calculus. Read at the gates it is gradient times input."""
