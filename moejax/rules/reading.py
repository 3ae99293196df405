"""A reading of the forward pass: the rule for its cotangents, the gates on what it computes, its ledger's probes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.rules.gates import Gates
from moejax.rules.primitives import gate, probe
from moejax.rules.rule import MatMul, Plain, Rule, Slope, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """How one forward pass is read. The default reading is plain inference and costs nothing.

    Attributes:
        rule: what differs from calculus on the way back (static).
        gates: multiplicative gates, of all layers, or of one layer after :meth:`for_layer`.
        probes: zeros under ledger names, for each layer and token; the sum of their cotangents is what operations of
            that name fail to conserve, ``R(outputs) - R(inputs)``. What follows the last layer has other tokens, and
            books at the first.
        taps: ones of a node's whole shape under its name (``"attention.3"``: that of layer 3; without the layer after
            :meth:`for_layer`); the cotangent of a tap is the relevance of every number at the node.
    """

    rule: Rule = field(default=Plain(), metadata={"static": True})
    gates: Gates = Gates()
    probes: dict[str, Float[Array, "L+1 B T"]] = field(default_factory=dict)
    taps: dict[str, Float[Array, "..."]] = field(default_factory=dict)

    def for_layer(self, layer: int) -> Self:
        """The reading of one layer; -1 is what follows the last."""
        probes = {k: p[layer] if layer >= 0 else p[layer][:, 0] for k, p in self.probes.items()}
        names = {k: k.rpartition(".") for k in self.taps}
        taps = {names[k][0]: tap for k, tap in self.taps.items() if names[k][2] == str(layer)}
        return replace(self, gates=self.gates.for_layer(layer), probes=probes, taps=taps)

    def by_layer(self, layers: int) -> list[Self]:
        """:meth:`for_layer` of each layer, and of what follows the last one."""
        # each array is cut once, into a tuple that is indexed as it was: cut after cut takes JAX a fifth of its tracing
        gates, probes = jax.tree.map(jnp.unstack, (self.gates, self.probes))
        cut = replace(self, gates=gates, probes=probes)
        return [cut.for_layer(i) for i in (*range(layers), -1)]

    def rearranged(
        self, by_row: Callable[[Float[Array, "B T K *s"]], Float[Array, "P *s"]], slots: tuple[int, int, int]
    ) -> "Reading":
        """For rows made of the routed slots ``[B T K]``, which then are the batch; gates are not taken along.

        Args:
            by_row: makes rows of what there is for each slot.
        """
        probes = {k: by_row(jnp.broadcast_to(p[..., None], slots)) for k, p in self.probes.items()}
        return Reading(self.rule, probes=probes, taps={k: by_row(self.taps[k]) for k in self.taps if k == "neurons"})

    def tap(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """``x`` as the node of that name, a place where the relevance of every number may be read."""
        return gate(x, self.taps[name]) if name in self.taps else x

    def gate(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """``x`` times its gate of that name, if there is one; the gate's missing last axes broadcast."""
        g = getattr(self.gates, name)
        return x if g is None else gate(x, g.reshape(*g.shape, *[1] * (x.ndim - g.ndim)))

    def gate_experts(
        self, x: Float[Array, "B T K D"], ids: Int[Array, "B T K"], prefix: str = ""
    ) -> Float[Array, "B T K D"]:
        """Each routed slot's contribution ``x`` times the gate of the expert that it was routed to.

        ``prefix`` names another set of experts, such as ``"attention_"``.
        """
        x = self.gate(f"{prefix}slots", x)
        experts = self.by_expert(f"{prefix}experts", ids.shape[:-1])
        return x if experts is None else gate(x, jnp.take_along_axis(experts, ids, axis=-1)[..., None])

    def by_expert(self, name: str, batch: tuple[int, ...]) -> Float[Array, "B T E"] | None:
        """The gate of that name for every token and expert, if there is one."""
        experts = getattr(self.gates, name)
        return None if experts is None else jnp.broadcast_to(experts, (*batch, experts.shape[-1]))

    def ledger_in(self, name: str, x: Float[Array, "B *s"]) -> Float[Array, "B *s"]:
        """``x`` as an input of the operation that the ledger books under ``name``."""
        return self._probe(name, x, -1.0)

    def ledger_out(self, name: str, x: Float[Array, "B *s"]) -> Float[Array, "B *s"]:
        """``x`` as the output of the operation that the ledger books under ``name``."""
        return self._probe(name, x, 1.0)

    def _probe(self, name: str, x: Array, sign: float) -> Array:
        return probe(x, self.probes[name], sign) if self.is_booked(name) else x

    def is_booked(self, name: str) -> bool:
        """Whether relevance that operations of that name do not conserve is booked."""
        return name in self.probes

    def book(self, name: str, operation: Callable[..., Array], *inputs: Array) -> Array:
        """``operation(*inputs)``, with the relevance that it does not conserve booked under ``name``."""
        return self.ledger_out(name, operation(*(self.ledger_in(name, x) for x in inputs)))

    def add_bias(self, x: Float[Array, "B *s M"], bias: Float[Array, "..."] | None) -> Float[Array, "B *s M"]:
        """``x + bias``, with the relevance that the bias takes booked under ``bias``; a missing bias adds nothing."""
        if bias is None:
            return x
        return self.rule.add(x, self._booked(bias, x.shape))

    def linear(
        self,
        matmul: MatMul,
        x: Float[Array, "B *s D"],
        weight: Weight,
        bias: Float[Array, "..."] | None = None,
        slope: Slope | None = None,
    ) -> Float[Array, "B *c"]:
        """``matmul(x, weight) + bias`` under the rule (:meth:`Rule.linear`), the bias broadcast and booked."""
        if bias is not None:
            bias = self._booked(bias, jax.eval_shape(matmul, x, weight).shape)
        return self.rule.linear(matmul, x, weight, bias, slope)

    def _booked(self, bias: Array, shape: tuple[int, ...]) -> Array:
        return self.ledger_out("bias", jnp.broadcast_to(bias, shape))
