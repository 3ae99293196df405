"""The compiled engine: one forward pass, one vector-Jacobian product per seed, read at the gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import MoejaxError, PromptError
from moejax.layers.linear import matmul_f32_accum
from moejax.models import Config, Decoder, FlatDecoder, Hidden, unflatten
from moejax.models.data_parallel import REPLICATED, gate_specs, num_shards, shard_map_data, split
from moejax.program import Program
from moejax.routing import Routing
from moejax.rules import Gates, Reading, Rule
from moejax.xla import refuse_wrong_sums

Pulled = tuple[Any, Any, Any]
"""Cotangents of gates, probes and taps."""

BEST = -1
"""Stands for the token with the largest logit, known only after the forward pass."""


class TargetValues(NamedTuple):
    """Values of the targets, the tokens that were meant, and the logits at their positions."""

    target: Float[Array, "B N"]
    ids: Int[Array, "B N J"]
    logits: Float[Array, "B N V"]


@runtime_checkable
class Seeds(Protocol):
    """N targets for each of B sequences, of which each leaf has an entry."""

    @property
    def num_targets(self) -> int:
        """N."""
        ...

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        """The targets' values, to be differentiated; ``reading`` is that of the whole pass."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitSeeds:
    """Sums of logits ``z``: ``sum signs z[ids] - mean average(z) - expected sum(p z)``, ``p`` their softmax.

    Attributes:
        ids: tokens; :data:`BEST` is the one with the largest logit.
        rivals: terms that count ``-p[id] / sum of p over the rivals`` instead of their sign.
        dense: whether any ``mean`` or ``expected`` is not zero: then all logits take part in the backward pass.
    """

    positions: Int[Array, "B N"]
    ids: Int[Array, "B N J"]
    signs: Float[Array, "B N J"]
    rivals: Bool[Array, "B N J"]
    mean: Float[Array, "B N"]
    expected: Float[Array, "B N"]
    dense: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, positions: Int[Array, "B N"], ids: Int[Array, "B N J"], signs: Float[Array, "B N J"]) -> Self:
        """Sums of named logits alone."""
        nothing = jnp.zeros(positions.shape, signs.dtype)
        return cls(positions, ids, signs, jnp.zeros(ids.shape, bool), nothing, nothing)

    @property
    def num_targets(self) -> int:
        return self.positions.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        stream = jnp.take_along_axis(hidden.stream, self.positions[..., None], axis=1)
        logits = stop_gradient(decoder.logits(stream))
        ids = jnp.where(self.ids == BEST, jnp.argmax(logits, axis=-1, keepdims=True), self.ids)
        named = jnp.take_along_axis(logits, ids, axis=-1)
        signs = jnp.where(self.rivals, -jax.nn.softmax(named, axis=-1, where=self.rivals), self.signs)
        last = reading.for_layer(-1)
        normed = decoder.norm(stream, last)
        if not self.dense:
            # only the head's rows that a seed names take part in the backward pass
            rows = last.linear(_rows, normed, decoder.output_embedding[ids])
            return TargetValues((rows * signs).sum(-1), ids, logits)
        background = self.mean[..., None] / logits.shape[-1] + self.expected[..., None] * jax.nn.softmax(logits)
        one_hot = jax.nn.one_hot(ids, logits.shape[-1], dtype=logits.dtype)
        every = last.linear(matmul_f32_accum, normed, decoder.output_embedding)
        return TargetValues((every * ((one_hot * signs[..., None]).sum(-2) - background)).sum(-1), ids, logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingSeeds:
    """Sums of the router's logits of one layer: ``sum signs l[ids]``."""

    positions: Int[Array, "B N"]
    ids: Int[Array, "B N J"]
    signs: Float[Array, "B N J"]
    layer: int = field(metadata={"static": True})
    attention: bool = field(default=False, metadata={"static": True})

    @property
    def num_targets(self) -> int:
        return self.positions.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        routing = hidden.routing("attention" if self.attention else "feed_forward")[self.layer]
        assert routing is not None
        # the router's operation, which its logits have entered, ends here for the target
        logits = reading.for_layer(self.layer % len(hidden.aux)).ledger_out("router", routing.logits)
        scores = jnp.take_along_axis(logits, self.positions[..., None], axis=1)
        target = (jnp.take_along_axis(scores, self.ids, axis=-1) * self.signs).sum(-1)
        stream = jnp.take_along_axis(hidden.stream, self.positions[..., None], axis=1)
        return TargetValues(target, self.ids, stop_gradient(decoder.logits(stream)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamSeeds:
    """Products of directions with the residual stream that a layer reads; after the last, with what leaves it."""

    positions: Int[Array, "B N"]
    directions: Float[Array, "B N D"]
    layer: int = field(metadata={"static": True})

    @property
    def num_targets(self) -> int:
        return self.positions.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        stream = hidden.stream
        if self.layer < len(hidden.entering):
            # as the layer itself reads it; what leaves the last has passed there already
            own = reading.for_layer(self.layer)
            stream = own.tap("stream", own.gate("tokens", hidden.entering[self.layer]))
        at = jnp.take_along_axis(stream, self.positions[..., None], axis=1).astype(self.directions.dtype)
        last = jnp.take_along_axis(hidden.stream, self.positions[..., None], axis=1)
        ids = jnp.zeros((*self.positions.shape, 0), jnp.int32)
        return TargetValues((at * self.directions).sum(-1), ids, stop_gradient(decoder.logits(last)))


class Slots(NamedTuple):
    """The routed slots of all layers; a layer without a mixture has id -1 and weight 0."""

    ids: Int[Any, "L B T K"]
    weights: Float[Any, "L B T K"]


class Readout(NamedTuple):
    """All that one call reads, on the device or, once fetched (perhaps without the logits), on the host.

    ``ids`` are the seeds' with the best token filled in; ``vectors`` hold the relevance of every number at a node.
    """

    gates: Gates
    leaks: dict[str, Float[Any, "N L+1 B"]]
    vectors: dict[str, Float[Any, "N B ..."]]
    target: Float[Any, "B N"]
    ids: Int[Any, "B N J"]
    logits: Float[Any, "B N V"] | None
    routes: Slots | None
    attention_routes: Slots | None

    def cut(self, length: int) -> "Readout":
        """Without the padding behind so many tokens."""

        def routed(slots: Slots | None) -> Slots | None:
            return None if slots is None else Slots(slots.ids[:, :, :length], slots.weights[:, :, :length])

        def vector(node: str, v: Any) -> Any:
            return v[..., :length, :length] if node.startswith("edges.") else v[:, :, :length]

        return self._replace(
            gates=jax.tree.map(lambda g: g[:, :, :, :length], self.gates),
            vectors={node: vector(node, v) for node, v in self.vectors.items()},
            routes=routed(self.routes),
            attention_routes=routed(self.attention_routes),
        )


@partial(Program, static_argnames=("rule", "chunk", "nodes", "joint", "rematerialised_layers"))
def relevance(
    weights: Decoder | FlatDecoder,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    seeds: Seeds,
    interventions: Gates,
    *,
    rule: Rule,
    chunk: int | None = None,
    nodes: tuple[str, ...] = (),
    joint: bool = False,
    rematerialised_layers: int = 0,
) -> Readout:
    """Relevance at every gate for all seeds, in one forward pass and one backward pass over a batch of seeds.

    Over a mesh with an axis ``data``, its devices share the sequences; or, where that is less work or a layer lets
    sequences compete, the seeds: then each makes the forward pass of all.

    Args:
        valid: tokens that are not padding; ``None``, which saves time, where none is.
        interventions: interventions that hold during the pass.
        chunk: how many seeds a device propagates at a time at most, over one and the same forward pass; all by
            default.
        nodes: where to read the relevance of every number (:data:`NODES`), as ``"attention.3"``.
        joint: propagate the sum of a sequence's seeds, one cotangent in place of N.
        rematerialised_layers: of how many, counted from the first, to keep only the residual stream that enters them
            and compute the rest again on the way back.

    Raises:
        PromptError: there is no such node.
        MoejaxError: weights in float16, or sums that are wrong (:mod:`moejax.xla`).
    """
    refuse_wrong_sums()
    read = partial(_read, rule=rule, chunk=chunk, nodes=nodes, joint=joint, rematerialised_layers=rematerialised_layers)
    config, arguments, seen = weights.config, (weights, tokens, valid, seeds, interventions), None
    if num_shards(config.mesh) > 1:
        seen = jnp.arange(1 if joint else seeds.num_targets, dtype=jnp.int32)
    if seen is None or _by_sequence(config, len(tokens), len(seen)):
        placed = REPLICATED, split(0), split(0), split(0), gate_specs(interventions), REPLICATED
        # their axes in what is found
        found = Readout(split(2), split(2), split(1), split(0), split(0), split(0), split(1), split(1))
    else:
        placed = REPLICATED, REPLICATED, REPLICATED, REPLICATED, REPLICATED, split(0)
        found = Readout(split(0), split(0), split(0), REPLICATED, REPLICATED, REPLICATED, REPLICATED, REPLICATED)
    return shard_map_data(read, config.mesh, (*arguments, seen), placed, found)


def per_device(config: Config, sequences: int, seeds: int) -> tuple[int, int]:
    """How many sequences :func:`relevance` gives to a device, and how many seeds of each."""
    devices = num_shards(config.mesh)
    if _by_sequence(config, sequences, seeds):
        return -(-sequences // devices), seeds
    return sequences, -(-seeds // devices)


def _by_sequence(config: Config, sequences: int, seeds: int) -> bool:
    """Whether devices share sequences, not seeds: whichever leaves each with fewer passes."""
    devices = num_shards(config.mesh)
    passes = -(-sequences // devices) * (1 + seeds), sequences * (1 + -(-seeds // devices))
    return passes[0] <= passes[1] and not config.couples_sequences


def _read(
    weights: Decoder | FlatDecoder,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    seeds: Seeds,
    interventions: Gates,
    seen: Int[Array, " N"] | None,
    *,
    rule: Rule,
    chunk: int | None,
    nodes: tuple[str, ...],
    joint: bool,
    rematerialised_layers: int,
) -> Readout:
    """Relevance for the seeds of the numbers ``seen``, by default all, as one device computes it."""
    decoder = unflatten(weights)
    refuse_half(decoder)
    dtype = jnp.promote_types(decoder.embedding.dtype, jnp.float32)
    # summed once for all in the end: a sum over tokens is two more kernels wherever it stands
    entries = (decoder.config.num_layers + 1, *tokens.shape)
    probes = {name: jnp.zeros(entries, dtype) for name in sorted(rule.leaks)}
    readout = jax.tree.map(lambda g: g.astype(dtype), Gates.readout(decoder.config, tokens))
    taps = {node: jnp.ones(node_shape(decoder.config, node, tokens.shape), dtype) for node in nodes}

    def targets(gates: Gates, probes: dict[str, Array], taps: dict[str, Array]) -> tuple[Array, tuple]:
        reading = Reading(rule, gates.times(interventions), probes, _counted_from_the_end(taps, decoder.config))
        again = rematerialised_layers
        hidden = decoder.hidden(tokens, valid=valid, reading=reading, rematerialised_layers=again)
        target, ids, logits = seeds.read(decoder, hidden, reading)
        return target, (ids, logits, (hidden.routing(), hidden.routing("attention")))

    target, pull, (ids, logits, (routing, attention_routing)) = jax.vjp(targets, readout, probes, taps, has_aux=True)
    # joint: a one at every seed
    ones = jnp.ones((1, 1), target.dtype) if joint else jnp.eye(target.shape[1], dtype=target.dtype)
    seeded = ones[:, None] if seen is None else ones[seen, None]
    seeded = jnp.broadcast_to(seeded, (len(seeded), *target.shape))
    gates, leaks, vectors = _in_chunks(jax.vmap(pull), seeded, chunk or len(seeded))
    feed_forward, attention = _stack(routing), _stack(attention_routing)
    leaks = {name: leak.sum(-1) for name, leak in leaks.items()}
    return Readout(gates, leaks, vectors, target, ids, logits, feed_forward, attention)


def _in_chunks(pull: Callable[[Array], Pulled], seeds: Float[Array, "N B M"], chunk: int) -> Pulled:
    """``pull`` of at most ``chunk`` seeds at a time, in chunks of one size; the last may hold seeds of zero."""
    count = len(seeds)
    chunks = -(-count // chunk)
    if chunks == 1:
        return pull(seeds)
    size = -(-count // chunks)
    padded = jnp.pad(seeds, [(0, chunks * size - count), (0, 0), (0, 0)])
    parts = jax.lax.map(pull, padded.reshape(chunks, size, *seeds.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:count], parts)


def checked_chunk(chunk: int | None) -> int | None:
    """``chunk``, which is positive if it is given.

    Raises:
        MoejaxError: it is not.
    """
    if chunk is not None and chunk < 1:
        raise MoejaxError(f"chunk={chunk} must be positive.")
    return chunk


def refuse_half(decoder: Decoder) -> None:
    """Raise ``MoejaxError`` for weights in float16."""
    if decoder.embedding.dtype == jnp.float16:
        raise MoejaxError(
            "float16 overflows and underflows in silence on the way back; load with dtype='bfloat16' or 'float32'."
        )


NODES = {
    "stream": "residual stream entering the layer; of the layer after the last, what enters the final norm",
    "attention_norm": "what attention reads",
    "edges": "what each query reads of each key, for each head [H T S]",
    "attention": "what attention writes",
    "middle": "residual stream between attention and feed-forward part",
    "feed_forward_norm": "what the feed-forward part reads",
    "neurons": "hidden units of the routed experts [T K F]",
    "feed_forward": "what the feed-forward part writes",
}
"""Nodes of a layer; they have the shape [T D] where nothing else is said."""


def node_shape(config: Config, node: str, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Of all the numbers at a node, for a batch of tokens of shape ``[B T]``.

    Raises:
        PromptError: there is no such node.
    """
    name, _, index = node.rpartition(".")
    layers = config.num_layers + (name == "stream")
    if name not in NODES or index not in map(str, range(layers)):
        example = f"attention.{config.num_layers - 1}"
        raise PromptError(f"there is no node {node!r}: name {', '.join(NODES)} and a layer, as {example!r}.")
    if name == "edges":
        return (batch[0], config.blocks[int(index)].half("attention").sizes.num_heads, batch[1], batch[1])
    if name == "neurons":
        sizes = config.blocks[int(index)].half("feed_forward").sizes
        if not sizes.num_experts:
            raise PromptError(f"there is no node {node!r}: that layer has no experts.")
        return (*batch, sizes.num_selected, sizes.expert_dim)
    return (*batch, config.model_dim)


def _counted_from_the_end(taps: dict[str, Array], config: Config) -> dict[str, Array]:
    """What follows the last layer is read as layer -1."""
    return {"stream.-1" if name == f"stream.{config.num_layers}" else name: tap for name, tap in taps.items()}


def _stack(routing: Sequence[Routing | None]) -> Slots | None:
    present = next((r for r in routing if r is not None), None)
    if present is None:
        return None
    none = Slots(jnp.full_like(present.ids, -1), jnp.zeros_like(present.weights))
    layers = [none if r is None else Slots(r.ids, r.weights) for r in routing]
    return Slots(*map(jnp.stack, zip(*layers, strict=True)))


def _rows(x: Float[Array, "B N D"], weight: Float[Array, "B N J D"]) -> Float[Array, "B N J"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bnd,bnjd->bnj", x, weight, preferred_element_type=wide)
