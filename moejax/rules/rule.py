"""The base class of rules: one method for every place where relevance propagation may differ from calculus."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.cotangents import accumulation_dtype, elementwise

Weight = Array | Any
"""A matrix, a stack of matrices, or either in a packed format that the product itself unpacks."""

MatMul = Callable[[Array, Weight], Array]
"""A product of inputs and a weight, linear in both."""

Slope = Callable[[Array], Array]
"""``a(x) / x`` of an activation ``a``."""

Total = Callable[[Float[Array, "*b K D"]], Float[Array, "*b D"]]
"""A sum over the routed slots of a token, on one device or several."""


def over_slots(terms: Float[Array, "*b K D"]) -> Float[Array, "*b D"]:
    """Sum over the slots, all of which are on this device."""
    return terms.sum(-2)


@runtime_checkable
class AttentionProduct(Protocol):
    """``softmax(q k^T * scale / temperature) v`` under the layer's mask; sinks are divided by the temperature too."""

    def __call__(self, q: Array, k: Array, v: Array, temperature: float = 1.0) -> Array: ...


def activate(slope: Slope, gate: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Compute the activation ``gate * slope(gate)`` in float32 and return it in the dtype of ``gate``."""
    wide = gate.astype(accumulation_dtype(gate))
    return (wide * slope(wide)).astype(gate.dtype)


@dataclass(frozen=True)
class Rule:
    """Cotangents at the places where relevance propagation may differ from calculus.

    A rule never changes a value: every method returns bit for bit the value that this base class returns. This base
    class is ordinary calculus. A new rule is a frozen dataclass, derived from it, that overrides the methods it treats
    differently and names in ``leaks`` the operations at which it does not conserve relevance. Rules are hashable and
    static under ``jit``; :func:`register_rule` gives them a name.
    """

    @property
    def leaks(self) -> frozenset[str]:
        """Names of the operations that do not conserve relevance; the ledger books what each of them loses or gains.

        Names: ``norm``, ``activation``, ``clamp``, ``softmax`` (attention, from queries, keys and values to heads),
        ``router`` (from router logits and expert outputs to weighted expert outputs), ``gate`` (from the logits of
        attention's gates and the heads to the gated heads), ``bias``.
        """
        return frozenset({"norm", "activation", "clamp", "softmax", "router", "gate", "bias"})

    def norm(self, x: Float[Array, "*b D"], inverse_rms: Float[Array, "*b 1"]) -> Float[Array, "*b D"]:
        """Normalise, without the norm's weight: ``x * inverse_rms``, where ``inverse_rms`` is a function of ``x``.

        Both are float32 or wider. Here it is ordinary calculus; a rule changes the cotangent of ``x`` alone.
        """
        return x * inverse_rms

    def gated(
        self,
        slope: Slope,
        gate: Float[Array, "*s"],
        up: Float[Array, "*s"],
        offset: float = 0.0,
        limit: float | None = None,
    ) -> Float[Array, "*s"]:
        """Gated activation ``a(gate) * (up + offset)`` with ``a(g) = g * slope(g)``; SiLU's slope is the sigmoid.

        :meth:`limited` limits its branches first. Where the ledger books the limits, the caller applies them itself and
        passes ``limit=None``.
        """

        def unit(gate: Array, up: Array) -> Array:
            gate, up = self.limited(gate, up, limit)
            return activate(slope, gate) * (up + offset)

        return elementwise(unit, gate, up)

    def limited(
        self, gate: Float[Array, "*s"], up: Float[Array, "*s"], limit: float | None
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
        """Limit the gate from above and the linear branch on both sides by :meth:`clamp`, as GPT-OSS does."""
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
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        """Compute heads from queries, keys and values by ``product``, the implementation of attention in use."""
        return product(q, k, v)

    def gate_heads(self, gates: Float[Array, "*s"], heads: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Multiply attention's heads by their gates, sigmoids that are no part of a feed-forward unit."""
        return gates * heads

    def mix(self, weights: Float[Array, "*b K"], outputs: Float[Array, "*b K D"]) -> Float[Array, "*b K D"]:
        """Multiply each routed slot's expert output by its routing weight."""
        return weights[..., None] * outputs

    def clamp(self, x: Float[Array, "*s"], low: float, high: float) -> Float[Array, "*s"]:
        """Limit ``x`` to ``[low, high]``."""
        return jnp.clip(x, low, high)

    def combine(self, terms: Float[Array, "*b K D"], total: Total = over_slots) -> Float[Array, "*b D"]:
        """Sum the weighted outputs of a token's routed slots.

        Args:
            total: computes the sum, over all devices that hold slots of the token. The returned value, and any other
                value that replaces it in the backward pass, must be a result of ``total``.
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
        """Linear map ``matmul(x, weight) + bias``; all dense, per-expert and head products pass through here.

        Args:
            matmul: the product, linear in both its arguments.
            bias: already broadcast to the shape of the product.
            slope: given for the first product of a feed-forward unit: the slope of the activation that it enters. The
                last axes of that product are the unit's branches (gate and linear branch, or one branch) and F.
        """
        y = matmul(x, weight)
        return y if bias is None else y + bias

    def add(self, stream: Float[Array, "*b D"], branch: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Residual sum ``stream + branch``."""
        return stream + branch
