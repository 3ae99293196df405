"""A reading of the forward pass: its rule, the gates on its parts, the ledger's probes, and what happens at nodes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError
from moejax.ops.cotangents import gate, probe
from moejax.rules.edits import Edits, edited
from moejax.rules.gates import Gates
from moejax.rules.nodes import NODE_OF_GATE, NODES
from moejax.rules.plain import Plain
from moejax.rules.rule import MatMul, Rule, Slope, Weight


class Passed:
    """What passes the nodes of one layer during one trace; made for that trace and dropped after it.

    Attributes:
        values: the values that the reading asks for.
        nodes: names of all nodes that a value has passed.
    """

    def __init__(self) -> None:
        self.values: dict[str, Array] = {}
        self.nodes: set[str] = set()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """How one forward pass is read. The default reading is plain inference and costs nothing.

    Attributes:
        rule: the rule of the backward pass (static).
        gates: multiplicative gates, of all layers, or of one layer after :meth:`for_layer`.
        probes: zeros for each layer and token, by name in the ledger. The sum of their cotangents is the relevance that
            operations of that name fail to conserve, ``R(outputs) - R(inputs)``. The final norm and the head run at
            other positions than the layers, so they book at the first token.
        taps: ones of a node's full shape, by its name: ``"attention.3"`` is the node of layer 3, ``"attention"`` the
            same after :meth:`for_layer`. The cotangent of a tap is the relevance of every number at the node.
        edits: changes of values at nodes, by full names as ``moejax.models.node_table.checked_edits`` returns them.
        names: names of the nodes whose values the pass returns (static).
        positions: the number of each token in its sequence, for edits that are limited to tokens; the decoder sets it.
        passed: what has passed the nodes of a layer; the block sets it for its own trace (static).
    """

    rule: Rule = field(default=Plain(), metadata={"static": True})
    gates: Gates = Gates()
    probes: dict[str, Float[Array, "L+1 B T"]] = field(default_factory=dict)
    taps: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    edits: Edits = Edits()
    names: tuple[str, ...] = field(default=(), metadata={"static": True})
    positions: Int[Array, "B T"] | None = None
    passed: Passed | None = field(default=None, metadata={"static": True})

    def for_layer(self, layer: int) -> Self:
        """Return the reading of one layer; -1 is the final norm and the head."""
        probes = {k: p[layer] if layer >= 0 else p[layer][:, 0] for k, p in self.probes.items()}
        split = {k: k.rpartition(".") for k in (*self.taps, *self.names)}
        here = {k: name for k, (name, _, number) in split.items() if number == str(layer)}
        return replace(
            self,
            gates=self.gates.for_layer(layer),
            probes=probes,
            taps={here[k]: tap for k, tap in self.taps.items() if k in here},
            edits=self.edits.for_layer(layer),
            names=tuple(here[k] for k in self.names if k in here),
        )

    def by_layer(self, layers: int) -> list[Self]:
        """Return :meth:`for_layer` of each layer, and last the reading of the final norm and the head.

        The stream that enters the final norm may be named by the number of layers, ``"stream.16"``, or by -1.
        """
        # unstack each array once and index the tuples: slicing it layer by layer takes a fifth of the time for tracing
        gates, probes = jax.tree.map(jnp.unstack, (self.gates, self.probes))

        def last(name):
            return "stream.-1" if name == f"stream.{layers}" else name

        unstacked = replace(
            self,
            gates=gates,
            probes=probes,
            taps={last(name): tap for name, tap in self.taps.items()},
            edits=self.edits.map_edits(lambda edit: replace(edit, node=last(edit.node))),
            names=tuple(map(last, self.names)),
        )
        return [unstacked.for_layer(i) for i in (*range(layers), -1)]

    def rearranged(
        self, by_row: Callable[[Float[Array, "B T K *s"]], Float[Array, "P *s"]], slots: tuple[int, int, int]
    ) -> "Reading":
        """Return the reading of expert rows: each of the ``P`` rows has the probes of its slot's token.

        Of the taps only ``"neurons"`` stays, rearranged. There are no gates and no edits, and nothing is returned.

        Args:
            by_row: rearranges an array ``[B T K ..]`` of the slots into one of the rows.
            slots: the sizes ``(B, T, K)``.
        """
        probes = {k: by_row(jnp.broadcast_to(p[..., None], slots)) for k, p in self.probes.items()}
        return Reading(self.rule, probes=probes, taps={k: by_row(self.taps[k]) for k in self.taps if k == "neurons"})

    def passing(self) -> "Reading":
        """Return the reading under which a layer runs: it collects the values that are asked for, if any are."""
        return replace(self, passed=Passed()) if self.names or self.edits else self

    def touches(self, name: str) -> bool:
        """Return whether the value at the node of that name is edited, returned or explained number by number."""
        return name in self.taps or self.needs_whole(name)

    def needs_whole(self, name: str) -> bool:
        """Return whether the value at the node of that name is edited or returned."""
        return name in self.names or bool(self.edits.at(name))

    def node(self, name: str, x: Float[Array, "*s"], ids: Int[Array, "B T K"] | None = None) -> Float[Array, "*s"]:
        """Pass ``x`` through the node of that name: edit it, tap it, and return it with the pass, as far as asked for.

        Args:
            name: a name in :data:`moejax.rules.NODES`.
            ids: the expert of each routed slot, for nodes that have slots.
        """
        for edit in self.edits.at(name):
            is_booked = NODES[name].is_explained and name != "edges"
            x = self.ledger_in("edits", x) if is_booked else x
            x = edited(edit, x, self.positions, ids)
            x = self.ledger_out("edits", x) if is_booked else x
        if name in self.taps:
            x = gate(x, self.taps[name])
        if self.passed is not None:
            self.passed.nodes.add(name)
            if name in self.names:
                self.passed.values[name] = x
        return x

    def edges(self) -> Any:
        """Return what attention's pattern is multiplied by, or a function that changes it, or ``None``: ``edges=``."""
        if self.passed is not None:
            self.passed.nodes.add("edges")
        if not self.edits.at("edges"):
            return self.taps.get("edges")
        return replace(self, names=(), passed=None).edit_edges

    def edit_edges(self, pattern: Float[Array, "B H T S"]) -> Float[Array, "B H T S"]:
        """Pass the pattern through its node."""
        return self.node("edges", pattern)

    def tap(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Pass ``x`` through a node, under the method's earlier name.

        Nodes at which a gate stands are left out: :meth:`gate` has passed them already.
        """
        warnings.warn("Reading.tap is now Reading.node; gate() passes its own node.", DeprecationWarning, stacklevel=2)
        return x if name in NODE_OF_GATE.values() else self.node(name, x)

    def gate(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Multiply ``x`` by the gate of that name, if there is one, and pass it through the node where the gate stands.

        The gate's missing last axes broadcast.
        """
        g = getattr(self.gates, name)
        x = x if g is None else gate(x, g.reshape(*g.shape, *[1] * (x.ndim - g.ndim)))
        return self.node(NODE_OF_GATE[name], x) if name in NODE_OF_GATE else x

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

    def passed_values(self, routed: dict[str, Any]) -> dict[str, Array]:
        """Return the values that were asked for, once the layer has run.

        Args:
            routed: the routing of each mixture by the prefix of its nodes: stands in for router nodes that a layer of
                its own kind does not pass.

        Raises:
            MoejaxError: a part of the layer did not pass a node that is asked for or edited.
        """
        if self.passed is None:
            return {}
        values, self.passed.values = self.passed.values, {}
        for prefix, routing in routed.items():
            told = {} if routing is None else dict(zip(_ROUTED, routing, strict=True))
            values = {f"{prefix}{name}": value for name, value in told.items()} | values
        missing = [edit.node for edit in self.edits.edits if edit.node not in self.passed.nodes]
        missing += [name for name in self.names if name not in values]
        if missing:
            raise MoejaxError(f"a part of this layer does not pass the node {missing[0]!r}: call reading.node there.")
        return {name: values[name] for name in self.names}

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


_ROUTED = ("router_logits", "router_scores", "expert_ids", "expert_weights")
"""The nodes of a router, as the fields of :class:`moejax.routing.Routing` are."""
