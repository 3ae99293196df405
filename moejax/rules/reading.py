"""A reading of the forward pass: its rule, the gates on its parts, the ledger's probes, taps at nodes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.cotangents import gate, probe
from moejax.rules.gates import Gates
from moejax.rules.plain import Plain
from moejax.rules.rule import MatMul, Rule, Slope, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """The rule, gates, probes and taps of one forward pass. The default reading is plain inference and costs nothing.

    Attributes:
        rule: the rule of the backward pass (static).
        gates: multiplicative gates, of all layers, or of one layer after :meth:`for_layer`.
        probes: zeros for each layer and token, by name in the ledger. The sum of their cotangents is the relevance that
            operations of that name fail to conserve, ``R(outputs) - R(inputs)``. The final norm and the head run at
            other positions than the layers, so they book at the first token.
        taps: ones of a node's full shape, by its name: ``"attention.3"`` is the node of layer 3, ``"attention"`` the
            same after :meth:`for_layer`. The cotangent of a tap is the relevance of every number at the node.
    """

    rule: Rule = field(default=Plain(), metadata={"static": True})
    gates: Gates = Gates()
    probes: dict[str, Float[Array, "L+1 B T"]] = field(default_factory=dict)
    taps: dict[str, Float[Array, "..."]] = field(default_factory=dict)

    def for_layer(self, layer: int) -> Self:
        """Return the reading of one layer; -1 is the final norm and the head."""
        probes = {k: p[layer] if layer >= 0 else p[layer][:, 0] for k, p in self.probes.items()}
        names = {k: k.rpartition(".") for k in self.taps}
        taps = {names[k][0]: tap for k, tap in self.taps.items() if names[k][2] == str(layer)}
        return replace(self, gates=self.gates.for_layer(layer), probes=probes, taps=taps)

    def by_layer(self, layers: int) -> list[Self]:
        """Return :meth:`for_layer` of each layer, and last the reading of the final norm and the head."""
        # unstack each array once and index the tuples: slicing it layer by layer takes a fifth of the time for tracing
        gates, probes = jax.tree.map(jnp.unstack, (self.gates, self.probes))
        unstacked = replace(self, gates=gates, probes=probes)
        return [unstacked.for_layer(i) for i in (*range(layers), -1)]

    def rearranged(
        self, by_row: Callable[[Float[Array, "B T K *s"]], Float[Array, "P *s"]], slots: tuple[int, int, int]
    ) -> "Reading":
        """Return the reading of expert rows: each of the ``P`` rows has the probes of its slot's token.

        Of the taps only ``"neurons"`` stays, rearranged. There are no gates.

        Args:
            by_row: rearranges an array ``[B T K ..]`` of the slots into one of the rows.
            slots: the sizes ``(B, T, K)``.
        """
        probes = {k: by_row(jnp.broadcast_to(p[..., None], slots)) for k, p in self.probes.items()}
        return Reading(self.rule, probes=probes, taps={k: by_row(self.taps[k]) for k in self.taps if k == "neurons"})

    def tap(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Return ``x``, the node of that name; its tap, if there is one, reads the relevance of every number."""
        return gate(x, self.taps[name]) if name in self.taps else x

    def gate(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Multiply ``x`` by the gate of that name, if there is one; the gate's missing last axes broadcast."""
        g = getattr(self.gates, name)
        return x if g is None else gate(x, g.reshape(*g.shape, *[1] * (x.ndim - g.ndim)))

    def gate_experts(
        self, x: Float[Array, "B T K D"], ids: Int[Array, "B T K"], prefix: str = ""
    ) -> Float[Array, "B T K D"]:
        """Multiply each routed slot's contribution ``x`` by the gate of the expert that it was routed to.

        Args:
            ids: the expert of each slot.
            prefix: ``"attention_"`` for attention experts.
        """
        x = self.gate(f"{prefix}slots", x)
        experts = self.by_expert(f"{prefix}experts", ids.shape[:-1])
        return x if experts is None else gate(x, jnp.take_along_axis(experts, ids, axis=-1)[..., None])

    def by_expert(self, name: str, batch: tuple[int, ...]) -> Float[Array, "B T E"] | None:
        """Return the gate of that name, broadcast to every token, or ``None`` if there is none."""
        experts = getattr(self.gates, name)
        return None if experts is None else jnp.broadcast_to(experts, (*batch, experts.shape[-1]))

    def ledger_in(self, name: str, x: Float[Array, "B *s"]) -> Float[Array, "B *s"]:
        """Mark ``x`` as an input of the operation that the ledger books under ``name``; return it."""
        return self._probe(name, x, -1.0)

    def ledger_out(self, name: str, x: Float[Array, "B *s"]) -> Float[Array, "B *s"]:
        """Mark ``x`` as the output of the operation that the ledger books under ``name``; return it."""
        return self._probe(name, x, 1.0)

    def _probe(self, name: str, x: Array, sign: float) -> Array:
        return probe(x, self.probes[name], sign) if self.is_booked(name) else x

    def is_booked(self, name: str) -> bool:
        """Return whether the ledger books operations of that name."""
        return name in self.probes

    def book(self, name: str, operation: Callable[..., Array], *inputs: Array) -> Array:
        """Compute ``operation(*inputs)`` and book the relevance that it does not conserve under ``name``."""
        return self.ledger_out(name, operation(*(self.ledger_in(name, x) for x in inputs)))

    def add_bias(self, x: Float[Array, "B *s O"], bias: Float[Array, "..."] | None) -> Float[Array, "B *s O"]:
        """Add ``bias`` to ``x`` and book the relevance that it takes under ``bias``; ``None`` adds nothing."""
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
        """Linear map ``matmul(x, weight) + bias`` under the rule; the bias is broadcast and booked."""
        if bias is not None:
            bias = self._booked(bias, jax.eval_shape(matmul, x, weight).shape)
        return self.rule.linear(matmul, x, weight, bias, slope)

    def _booked(self, bias: Array, shape: tuple[int, ...]) -> Array:
        return self.ledger_out("bias", jnp.broadcast_to(bias, shape))
