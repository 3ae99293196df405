"""The compiled engine: one forward pass, one vector-Jacobian product per seed, read at the gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import MoejaxError, PromptError
from moejax.models import Config, Decoder, FlatDecoder, unflatten
from moejax.models.activations import edit_specs
from moejax.models.data_parallel import gate_specs, num_shards, placed, placements, shard_map_data
from moejax.models.node_table import node_shape
from moejax.program import Program
from moejax.relevance.seeds import Seeds
from moejax.routing import Routing
from moejax.rules import NODES as EVERY_NODE
from moejax.rules import Edits, Gates, Reading, Rule
from moejax.xla import refuse_wrong_sums

Pulled = tuple[Any, Any, Any]
"""Cotangents of gates, probes and taps."""


class Slots(NamedTuple):
    """Experts and weights of the routed slots of all layers; id -1 and weight 0 in layers without a mixture."""

    ids: Int[Any, "L B T K"]
    weights: Float[Any, "L B T K"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PassInputs:
    """The arguments of one pass, with the axis along which devices split each of them.

    Devices split either the sequences of a batch or the seeds of all sequences.

    Attributes:
        weights: the decoder, flat or not.
        tokens: token ids.
        valid: true where a token is no padding; ``None`` if there is no padding.
        seeds: the targets.
        interventions: gates that hold during the pass.
        edits: checked edits that hold during the pass.
        seed_numbers: numbers of the seeds whose cotangents the pass propagates; ``None`` for all.
    """

    weights: Decoder | FlatDecoder = placed()
    tokens: Int[Array, "B T"] = placed(sequences=0)
    valid: Bool[Array, "B T"] | None = placed(sequences=0)
    seeds: Seeds = placed(sequences=0)
    interventions: Gates = placed(sequences=gate_specs)
    edits: Edits = placed(sequences=edit_specs)
    seed_numbers: Int[Array, " N"] | None = placed(seeds=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Readout:
    """All that one pass reads, on the device or, once fetched, on the host.

    Attributes:
        gates: relevance at every gate, with an axis N of targets in front.
        leaks: relevance that each named operation did not conserve.
        vectors: relevance of every number at the nodes that were asked for.
        target: values of the targets.
        ids: ids of the targets' terms, with the best token filled in.
        logits: next-token logits at the targets' positions; ``None`` if they were not fetched.
        routes, attention_routes: the routed slots of feed-forward and of attention layers.
    """

    gates: Gates = placed(sequences=2, seeds=0)
    leaks: dict[str, Float[Any, "N L+1 B"]] = placed(sequences=2, seeds=0)
    vectors: dict[str, Float[Any, "N B ..."]] = placed(sequences=1, seeds=0)
    target: Float[Any, "B N"] = placed(sequences=0)
    ids: Int[Any, "B N J"] = placed(sequences=0)
    logits: Float[Any, "B N V"] | None = placed(sequences=0)
    routes: Slots | None = placed(sequences=1)
    attention_routes: Slots | None = placed(sequences=1)

    def cut(self, length: int) -> "Readout":
        """Return the readout of the first ``length`` tokens, without the padding behind them."""

        def cut_slots(slots: Slots | None) -> Slots | None:
            return None if slots is None else Slots(slots.ids[:, :, :length], slots.weights[:, :, :length])

        def cut_vector(node: str, v: Any) -> Any:
            return v[..., :length, :length] if node.startswith("edges.") else v[:, :, :length]

        return replace(
            self,
            gates=jax.tree.map(lambda g: g[:, :, :, :length], self.gates),
            vectors={node: cut_vector(node, v) for node, v in self.vectors.items()},
            routes=cut_slots(self.routes),
            attention_routes=cut_slots(self.attention_routes),
        )


@partial(Program, static_argnames=("rule", "chunk", "nodes", "joint", "rematerialised_layers"))
def relevance(
    weights: Decoder | FlatDecoder,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    seeds: Seeds,
    interventions: Gates,
    edits: Edits = Edits(),
    *,
    rule: Rule,
    chunk: int | None = None,
    nodes: tuple[str, ...] = (),
    joint: bool = False,
    rematerialised_layers: int = 0,
) -> Readout:
    """Compute relevance at every gate for all seeds, in one forward pass and one backward pass per batch of seeds.

    Over a mesh with an axis ``data`` the devices split the sequences. If a layer couples sequences, or if it is less
    work, they split the seeds instead, and each device makes the forward pass of all sequences.

    Args:
        valid: true where a token is no padding. ``None`` means that there is none, which saves time.
        interventions: gates that hold during the pass.
        edits: checked edits that hold during the pass; what they add or set enters the ledger under ``edits``.
        chunk: how many seeds at most a device propagates at a time, over one and the same forward pass; by default all.
        nodes: names of the nodes at which to read the relevance of every number (:data:`NODES`): ``"attention.3"``.
        joint: propagate the sum of a sequence's seeds, one cotangent instead of N.
        rematerialised_layers: how many layers, counted from the first, keep only the residual stream that enters them
            and are computed again in the backward pass.

    Raises:
        PromptError: there is no such node.
        MoejaxError: weights in float16, or sums that are wrong (:mod:`moejax.xla`).
    """
    refuse_wrong_sums()
    read = partial(_read, rule=rule, chunk=chunk, nodes=nodes, joint=joint, rematerialised_layers=rematerialised_layers)
    config, numbers = weights.config, None
    if num_shards(config.mesh) > 1:
        numbers = jnp.arange(1 if joint else seeds.num_targets, dtype=jnp.int32)
    inputs = PassInputs(weights, tokens, valid, seeds, interventions, edits, numbers)
    by_sequence = numbers is None or _splits_sequences(config, len(tokens), len(numbers))
    over = "sequences" if by_sequence else "seeds"
    return shard_map_data(read, config.mesh, (inputs,), (placements(inputs, over),), placements(Readout, over))


def per_device(config: Config, sequences: int, seeds: int) -> tuple[int, int]:
    """Return how many sequences :func:`relevance` gives to a device, and how many seeds of each sequence."""
    devices = num_shards(config.mesh)
    if _splits_sequences(config, sequences, seeds):
        return -(-sequences // devices), seeds
    return sequences, -(-seeds // devices)


def _splits_sequences(config: Config, sequences: int, seeds: int) -> bool:
    """Return whether devices split sequences, not seeds: that which leaves each device with fewer passes."""
    devices = num_shards(config.mesh)
    passes = -(-sequences // devices) * (1 + seeds), sequences * (1 + -(-seeds // devices))
    return passes[0] <= passes[1] and not config.couples_sequences


def _read(
    inputs: PassInputs,
    *,
    rule: Rule,
    chunk: int | None,
    nodes: tuple[str, ...],
    joint: bool,
    rematerialised_layers: int,
) -> Readout:
    """Compute the relevance of the seeds ``inputs.seed_numbers`` on one device."""
    decoder, tokens, seeds = unflatten(inputs.weights), inputs.tokens, inputs.seeds
    refuse_half(decoder)
    dtype = decoder.accumulation_dtype
    # probes keep the axis of tokens, and one sum over it ends the pass: a sum at each operation costs two kernels there
    entries = (decoder.config.num_layers + 1, *tokens.shape)
    booked = rule.leaks | decoder.config.leaks | ({"edits"} if inputs.edits else set())
    probes = {name: jnp.zeros(entries, dtype) for name in sorted(booked)}
    readout = jax.tree.map(lambda g: g.astype(dtype), Gates.readout(decoder.config, tokens))
    taps = {node: jnp.ones(explained_shape(decoder.config, node, tokens.shape), dtype) for node in nodes}

    def targets(gates: Gates, probes: dict[str, Array], taps: dict[str, Array]) -> tuple[Array, tuple]:
        reading = Reading(rule, gates.times(inputs.interventions), probes, taps, inputs.edits)
        hidden = decoder.hidden(
            tokens, valid=inputs.valid, reading=reading, rematerialised_layers=rematerialised_layers
        )
        target, ids, logits = seeds.read(decoder, hidden, reading)
        return target, (ids, logits, (hidden.routing(), hidden.routing("attention")))

    target, pull, (ids, logits, (routing, attention_routing)) = jax.vjp(targets, readout, probes, taps, has_aux=True)
    # a joint target has the cotangent one at every seed
    ones = jnp.ones((1, 1), target.dtype) if joint else jnp.eye(target.shape[1], dtype=target.dtype)
    cotangents = ones[:, None] if inputs.seed_numbers is None else ones[inputs.seed_numbers, None]
    cotangents = jnp.broadcast_to(cotangents, (len(cotangents), *target.shape))
    gates, leaks, vectors = _in_chunks(jax.vmap(pull), cotangents, chunk or len(cotangents))
    feed_forward, attention = _stack(routing), _stack(attention_routing)
    leaks = {name: leak.sum(-1) for name, leak in leaks.items()}
    return Readout(gates, leaks, vectors, target, ids, logits, feed_forward, attention)


def _in_chunks(pull: Callable[[Array], Pulled], cotangents: Float[Array, "N B _"], chunk: int) -> Pulled:
    """Apply ``pull`` to at most ``chunk`` cotangents at a time, in chunks of one size; zeros fill up the last chunk."""
    count = len(cotangents)
    chunks = -(-count // chunk)
    if chunks == 1:
        return pull(cotangents)
    size = -(-count // chunks)
    padded = jnp.pad(cotangents, [(0, chunks * size - count), (0, 0), (0, 0)])
    parts = jax.lax.map(pull, padded.reshape(chunks, size, *cotangents.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:count], parts)


def checked_chunk(chunk: int | None) -> int | None:
    """Return ``chunk``.

    Raises:
        MoejaxError: it is given and not positive.
    """
    if chunk is not None and chunk < 1:
        raise MoejaxError(f"chunk={chunk} must be positive.")
    return chunk


def refuse_half(decoder: Decoder) -> None:
    """Raise ``MoejaxError`` for weights in float16."""
    if decoder.embedding.dtype == jnp.float16:
        raise MoejaxError(
            "float16 overflows and underflows silently in the backward pass; load with dtype='bfloat16' or 'float32'."
        )


NODES = {name: f"{kind.meaning} [{kind.letters}]" for name, kind in EVERY_NODE.items() if kind.is_explained}
"""Nodes at which relevance can be read, with what stands there; ``moejax.nodes(lm)`` lists those that a model has."""


def explained_shape(config: Config, node: str, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the numbers at a node, whose relevance can be read.

    Args:
        node: name and layer, as in ``"attention.3"``.
        batch: the shape ``(B, T)`` of the token ids.

    Raises:
        PromptError: there is no such node, or it lies inside of a router.
    """
    shape = node_shape(config, node, batch)
    if (name := node.rpartition(".")[0]) not in NODES:
        raise PromptError(f"relevance is not read inside of a router ({name}): name {', '.join(NODES)}.")
    return shape


def _stack(routing: Sequence[Routing | None]) -> Slots | None:
    """Stack the routed slots of all layers; ``None`` if no layer is a mixture."""
    present = next((r for r in routing if r is not None), None)
    if present is None:
        return None
    none = Slots(jnp.full_like(present.ids, -1), jnp.zeros_like(present.weights))
    layers = [none if r is None else Slots(r.ids, r.weights) for r in routing]
    return Slots(*map(jnp.stack, zip(*layers, strict=True)))
