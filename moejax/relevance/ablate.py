"""``ablate``: switch off parts of a model, many at a time, and measure how a target changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError
from moejax.lm import LM, Prompt
from moejax.models import Config, FlatDecoder, unflatten
from moejax.models.data_parallel import num_shards, placed, placements, shard_map_data
from moejax.processes import to_host
from moejax.program import Program
from moejax.relevance.engine import checked_chunk
from moejax.relevance.question import ResolvedTarget, hidden_per_sequence, read_first_rows_tokens, repeat_rows
from moejax.relevance.result import Relevance
from moejax.relevance.seeds import Seeds
from moejax.relevance.targets import Argmax, TargetLike
from moejax.rules import Gates, Reading
from moejax.rules.gates import HOW, check_index

_NOWHERE = np.iinfo(np.int32).max
"""Stands in place of a layer for a switch that switches nothing."""

Kind = Literal["expert", "attention_expert", "head", "token", "attention", "feed_forward", "shared"]

_TOKENS_AT_A_TIME = 8192
"""Number of tokens in one batch of interventions on a device, unless a chunk is given."""


@dataclass(frozen=True)
class Cell:
    """One part of a model that can be switched off; make it with :meth:`expert` and the other constructors.

    Attributes:
        kind: the kind of part.
        layer: its layer.
        index: number of the expert or head; 0 for other kinds.
        position: the token at which it is switched off; ``None`` for all tokens.
    """

    kind: Kind
    layer: int
    index: int = 0
    position: int | None = None

    @classmethod
    def expert(cls, layer: int, expert: int, token: int | None = None) -> Self:
        """Make a cell of an expert's contribution to a token."""
        return cls("expert", layer, expert, token)

    @classmethod
    def attention_expert(cls, layer: int, expert: int, token: int | None = None) -> Self:
        """Make a cell of an attention expert's contribution to a token."""
        return cls("attention_expert", layer, expert, token)

    @classmethod
    def head(cls, layer: int, head: int, token: int | None = None) -> Self:
        """Make a cell of an attention head's output at a query."""
        return cls("head", layer, head, token)

    @classmethod
    def token(cls, token: int, layer: int = 0) -> Self:
        """Make a cell of a token's residual stream entering a layer; layer 0 is the token's embedding."""
        return cls("token", layer, position=token)

    @classmethod
    def attention(cls, layer: int, token: int | None = None) -> Self:
        """Make a cell of all that a layer's attention writes."""
        return cls("attention", layer, position=token)

    @classmethod
    def feed_forward(cls, layer: int, token: int | None = None) -> Self:
        """Make a cell of all that a layer's feed-forward part writes."""
        return cls("feed_forward", layer, position=token)

    @classmethod
    def shared(cls, layer: int, token: int | None = None) -> Self:
        """Make a cell of a layer's shared expert's contribution to a token."""
        return cls("shared", layer, position=token)

    @classmethod
    def routed(cls, relevance: Relevance) -> list[Self]:
        """Make a cell for the expert of every routed slot at its token.

        They stand in the order of ``relevance.experts[n].ravel()``; layers without experts have none.
        """
        ids = relevance.expert_ids
        return [cls.expert(*map(int, (at[0], ids[at], at[1]))) for at in np.ndindex(ids.shape) if ids[at] >= 0]


def ablate(
    lm: LM,
    prompt: Prompt,
    *,
    cells: Sequence[Cell | Sequence[Cell]],
    target: TargetLike = Argmax(),
    how: str = "zero",
    gates: Gates | None = None,
    chunk: int | None = None,
) -> Float[np.ndarray, "M N"]:
    """Measure by how much each of M interventions changes each of N targets: the intact value minus the changed value.

    Over a mesh with an axis ``data`` the devices split the interventions.

    A target's tokens are the tokens of the intact pass. Averages of logits weighted by probabilities are measured as
    the logarithms whose first order they are: for :class:`LogProbability` it is the change of the log-probability.

    Args:
        cells: what to switch off; cells in a list of their own are switched off together.
        how: what happens in place of an expert. ``"zero"``: nothing. ``"renormalise"``: the weights of the token's
            other experts grow so that their sum is kept. ``"replace"``: the next best expert runs, with the weights
            that it would have if the router had selected it. All other kinds of cells are zeroed.
        gates: interventions that hold throughout; they must broadcast over the batch. The check that enough experts
            are left for ``"replace"`` does not count experts that ``gates.selectable`` excludes.
        chunk: how many interventions a device runs at a time, to bound memory; by default as many as make 8192 tokens.

    Raises:
        PromptError: as in :func:`explain`.
        IndexError: a cell is not in the model or the prompt.
        MoejaxError: an unknown ``how``, a kind of cell that the layer does not have, too few experts left to replace
            others, a ``chunk`` that is not positive.
    """
    resolved = ResolvedTarget.of(lm, [prompt], target)
    interventions = [[c] if isinstance(c, Cell) else list(c) for c in cells]
    held = resolved.interventions(gates)
    tokens = resolved.tokens(gates)
    at_once = (checked_chunk(chunk) or max(1, _TOKENS_AT_A_TIME // tokens.shape[1])) * num_shards(lm.config.mesh)
    rows = min(at_once, _rounded(len(interventions)))
    values = []
    switches = _switches(lm.config, resolved.length, interventions, how)
    for start in range(0, len(interventions), rows):
        # passes without a switch fill up the last chunk, so that it needs no program of its own
        part = {name: _filled(s[start : start + rows], rows) for name, s in switches.items()}
        values.append(_values(lm.flat, tokens, resolved.seeds, part, held))
    parts = [np.asarray(intact, np.float64) - np.asarray(changed, np.float64) for intact, changed in to_host(values)]
    changes = np.concatenate([np.zeros((0, len(resolved.terms[0]))), *parts])[: len(interventions)]
    return changes.sum(-1, keepdims=True) if resolved.target.joint else changes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AblationInputs:
    """The arguments of one batch of interventions, with the axis along which devices split them.

    Attributes:
        switches: layer, token (-1 for all) and index of the J cells of each intervention, by field of :class:`Gates`.
        held: gates that hold in every pass.
    """

    weights: FlatDecoder = placed()
    tokens: Int[Array, "1 T"] = placed()
    seeds: Seeds = placed()
    switches: dict[str, Int[Array, "M J 3"]] = placed(interventions=0)
    held: Gates = placed()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AblationValues:
    """Values of the targets without and with each intervention."""

    intact: Float[Array, "1 N"] = placed()
    changed: Float[Array, "M N"] = placed(interventions=0)


@Program
def _values(
    weights: FlatDecoder,
    tokens: Int[Array, "1 T"],
    seeds: Seeds,
    switches: dict[str, Int[Array, "M J 3"]],
    held: Gates,
) -> tuple[Float[Array, "1 N"], Float[Array, "M N"]]:
    """Compute the targets' values without and with each intervention; the intact pass selects the best tokens."""
    inputs = AblationInputs(weights, tokens, seeds, switches, held)
    specs = placements(inputs, "interventions"), placements(AblationValues, "interventions")
    values = shard_map_data(_run, weights.config.mesh, (inputs,), specs[:1], specs[1])
    return values.intact, values.changed


def _run(inputs: AblationInputs) -> AblationValues:
    """Compute the values on one device, in one pass whose first row is intact."""
    decoder = unflatten(inputs.weights)
    switches = {
        name: jnp.pad(s, [(1, 0), (0, 0), (0, 0)], constant_values=_NOWHERE) for name, s in inputs.switches.items()
    }
    rows = len(next(iter(switches.values())))
    tokens, seeds = jnp.broadcast_to(inputs.tokens, (rows, inputs.tokens.shape[1])), repeat_rows(inputs.seeds, rows)
    reading = Reading(gates=_gates(decoder.config, tokens, switches).times(inputs.held))
    hidden = hidden_per_sequence(decoder, tokens, reading)
    values = read_first_rows_tokens(seeds, decoder, hidden, reading)[1]
    return AblationValues(values[:1], values[1:])


def _gates(config: Config, tokens: Array, switches: Mapping[str, Int[Array, "M J 3"]]) -> Gates:
    """Make gates that are zero at the switches, one batch row for each intervention."""
    ones, rows = Gates.ones(config, tokens), jnp.arange(len(tokens))[:, None, None]
    gates = {}
    for name, places in switches.items():
        gate = ones.ones_like(name)
        assert gate is not None
        layer, token, index = (places[..., i, None] for i in range(3))
        at = layer, rows, jnp.where(token < 0, jnp.arange(tokens.shape[1]), token), index
        # the layer of an empty switch lies behind the last, where nothing is set
        gates[name] = gate.at[at[: gate.ndim]].set(0, mode="drop")
    return Gates(**gates)


def _switches(
    config: Config, length: int, interventions: Sequence[Sequence[Cell]], how: str
) -> dict[str, Int[np.ndarray, "M J 3"]]:
    """Return layer, token (-1 for all) and index of every cell, by field of :class:`Gates`."""
    if how not in HOW:
        raise MoejaxError(f"how={how!r} is unknown; choose from {', '.join(HOW)}.")
    places: dict[str, list[list[tuple[int, int, int]]]] = {}
    for row, cells in enumerate(interventions):
        for cell in cells:
            name, place = _place(config, length, cell, how)
            places.setdefault(name, [[] for _ in interventions])[row].append(place)
        if how == "replace":
            _refuse_too_few(config, length, cells)
    out = {}
    for name, by_row in places.items():
        out[name] = np.full((len(by_row), _rounded(max(map(len, by_row))), 3), config.num_layers + 1, np.int32)
        for row, cells_of_row in enumerate(by_row):
            out[name][row, : len(cells_of_row)] = np.reshape(cells_of_row, (-1, 3))
    # without any cell there is still a pass for each intervention
    return out or {"tokens": np.full((len(interventions), 0, 3), 0, np.int32)}


def _place(config: Config, length: int, cell: Cell, how: str) -> tuple[str, tuple[int, int, int]]:
    """Return the field of :class:`Gates` that holds a cell, and its layer, token and index there.

    Raises:
        IndexError: the cell lies outside the model or the prompt.
        MoejaxError: the layer has no such kind of part.
    """
    if cell.kind not in get_args(Kind):
        raise MoejaxError(f"cells of kind {cell.kind!r} are unknown; choose from {', '.join(get_args(Kind))}.")
    layers = config.num_layers + (cell.kind == "token")
    check_index("layer", cell.layer, layers)
    check_index("token", cell.position or 0, length)
    name, count = cell.kind, 1
    if cell.kind == "token":
        name = "tokens"
    elif cell.kind == "head":
        name, count = "heads", config.num_heads
    elif cell.kind in ("expert", "attention_expert"):
        count, _ = _experts(config, cell)
        name = ("attention_" if cell.kind == "attention_expert" else "") + HOW[how]
    elif cell.kind == "shared" and not config.blocks[cell.layer].half("feed_forward").sizes.num_shared:
        raise MoejaxError(f"layer {cell.layer} has no shared expert.")
    check_index(cell.kind, cell.index, count)
    position = -1 if cell.position is None else cell.position % length
    return name, (cell.layer % layers, position, cell.index % count)


def _refuse_too_few(config: Config, length: int, cells: Sequence[Cell]) -> None:
    """Check that every token has as many experts left as it has slots.

    Raises:
        MoejaxError: too few experts are left.
    """
    closed: dict[tuple[Kind, int], list[set[int]]] = {}
    for cell in cells:
        if cell.kind not in ("expert", "attention_expert"):
            continue
        count, selected = _experts(config, cell)
        _, (layer, position, index) = _place(config, length, cell, "replace")
        by_token = closed.setdefault((cell.kind, layer), [set() for _ in range(length)])
        for token in range(length) if position < 0 else [position]:
            by_token[token].add(index)
            if count - len(by_token[token]) < selected:
                raise MoejaxError(
                    f"token {token} has {selected} slots for the {count} experts of layer {layer}; with "
                    f"{len(by_token[token])} switched off too few are left to take their places."
                )


def _experts(config: Config, cell: Cell) -> tuple[int, int]:
    """Return how many experts the layer of a cell has, and how many slots a token has there.

    Raises:
        MoejaxError: the layer has no such experts.
    """
    half = "attention" if cell.kind == "attention_expert" else "feed_forward"
    sizes = config.blocks[cell.layer].half(half).sizes
    if not sizes.num_experts:
        raise MoejaxError(f"layer {cell.layer} has no {cell.kind.replace('_', ' ')}s.")
    return sizes.num_experts, sizes.num_selected


def _rounded(count: int) -> int:
    """Round up to a power of two, so that few numbers of cells are compiled."""
    return 1 << max(count - 1, 0).bit_length()


def _filled(places: np.ndarray, rows: int) -> Array:
    """Fill up ``places`` to ``rows`` rows, with rows that switch nothing."""
    missing = [(0, rows - len(places)), (0, 0), (0, 0)]
    return jnp.asarray(np.pad(places, missing, constant_values=_NOWHERE))
