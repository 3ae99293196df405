"""``ablate``: switch parts of a model off, many at a time, and see how a target changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError
from moejax.layers import Aux, BlockAux
from moejax.lm import LM, Prompt, padded_length, right_pad
from moejax.models import Config, Decoder, FlatDecoder, Hidden, unflatten
from moejax.models.data_parallel import REPLICATED, num_shards, shard_map_data, split
from moejax.program import Program
from moejax.relevance.engine import LogitSeeds, Seeds, TargetValues, checked_chunk
from moejax.relevance.explain import decoder_dtype
from moejax.relevance.result import Relevance
from moejax.relevance.targets import Argmax, Target, TargetTerms, checked_target
from moejax.rules import Gates, Reading
from moejax.rules.gates import HOW, check_index

_NOWHERE = np.iinfo(np.int32).max
"""In place of a layer: switches nothing."""

Kind = Literal["expert", "attention_expert", "head", "token", "attention", "feed_forward", "shared"]

_TOKENS_AT_A_TIME = 8192
"""Tokens of one batch of interventions on a device, unless a chunk is given."""


@dataclass(frozen=True)
class Cell:
    """One part of a model that can be switched off; make it with :meth:`expert` and the other constructors.

    Attributes:
        index: of the expert or head; 0 where there is nothing to count.
        position: the token at which it is switched off; at all by default.
    """

    kind: Kind
    layer: int
    index: int = 0
    position: int | None = None

    @classmethod
    def expert(cls, layer: int, expert: int, token: int | None = None) -> Self:
        """What an expert contributes to a token."""
        return cls("expert", layer, expert, token)

    @classmethod
    def attention_expert(cls, layer: int, expert: int, token: int | None = None) -> Self:
        """What an attention expert contributes to a token."""
        return cls("attention_expert", layer, expert, token)

    @classmethod
    def head(cls, layer: int, head: int, token: int | None = None) -> Self:
        """The output of an attention head at a query."""
        return cls("head", layer, head, token)

    @classmethod
    def token(cls, token: int, layer: int = 0) -> Self:
        """The residual stream of a token where it enters a layer; of the first, its embedding."""
        return cls("token", layer, position=token)

    @classmethod
    def attention(cls, layer: int, token: int | None = None) -> Self:
        """All that a layer's attention writes."""
        return cls("attention", layer, position=token)

    @classmethod
    def feed_forward(cls, layer: int, token: int | None = None) -> Self:
        """All that a layer's feed-forward part writes."""
        return cls("feed_forward", layer, position=token)

    @classmethod
    def shared(cls, layer: int, token: int | None = None) -> Self:
        """What a layer's shared expert contributes to a token."""
        return cls("shared", layer, position=token)

    @classmethod
    def routed(cls, relevance: Relevance) -> list[Self]:
        """The expert of every routed slot at its token, in the order of ``relevance.experts[n].ravel()``.

        Slots of layers without experts are left out.
        """
        ids = relevance.expert_ids
        return [cls.expert(*map(int, (at[0], ids[at], at[1]))) for at in np.ndindex(ids.shape) if ids[at] >= 0]


def ablate(
    lm: LM,
    prompt: Prompt,
    *,
    cells: Sequence[Cell | Sequence[Cell]],
    target: Target = Argmax(),
    how: str = "zero",
    gates: Gates | None = None,
    chunk: int | None = None,
) -> Float[np.ndarray, "M N"]:
    """How much each of M interventions takes from each of N targets: the target without it minus that with it.

    Over a mesh with an axis ``data``, its devices share the interventions.

    A target's tokens are those of the intact pass. Averages of logits weighted by probabilities count as the
    logarithms that they are the first order of: the change of :class:`LogProbability` is that of the log-probability.

    Args:
        cells: what to switch off; several cells in one place are switched off together.
        how: what happens in place of an expert: ``"zero"`` nothing, ``"renormalise"`` the weights of the token's other
            experts grow so that their sum is kept, ``"replace"`` the next best expert runs with the weights as if the
            router had selected it. All else is zeroed.
        gates: interventions that hold throughout; they must broadcast over the batch. Experts that their ``choices``
            exclude are not counted where too few are left.
        chunk: how many interventions a device runs at a time, to bound memory; by default as many as make 8192 tokens.

    Raises:
        PromptError: as in :func:`explain`.
        IndexError: a cell is not in the model or the prompt.
        MoejaxError: an unknown ``how``, a kind of cell that the layer has not, too few experts left to take the places
            of others, a chunk of none.
    """
    question = Question.of(lm, prompt, target)
    length = len(question.ids)
    interventions = [[c] if isinstance(c, Cell) else list(c) for c in cells]
    held = Gates() if gates is None else gates.check(lm.config, question.ids)
    tokens = question.tokens(lm, gates)
    at_once = (checked_chunk(chunk) or max(1, _TOKENS_AT_A_TIME // tokens.shape[1])) * num_shards(lm.config.mesh)
    rows = min(at_once, _rounded(len(interventions)))
    found = []
    switches = _switches(lm.config, length, interventions, how)
    for start in range(0, len(interventions), rows):
        # a last chunk is filled up with passes without a switch, not to compile it anew
        part = {name: _filled(s[start : start + rows], rows) for name, s in switches.items()}
        intact, changed = _values(lm.flat, tokens, question.seeds, part, held)
        found.append((intact, changed))
    parts = [np.asarray(intact, np.float64) - np.asarray(changed, np.float64) for intact, changed in found]
    changes = np.concatenate([np.zeros((0, len(question.aims))), *parts])[: len(interventions)]
    return changes.sum(-1, keepdims=True) if target.joint else changes


class Question(NamedTuple):
    """A target resolved for one prompt: the sequence to run, and what to ask of it."""

    ids: list[int]
    aims: list[TargetTerms]
    seeds: Seeds

    @classmethod
    def of(cls, lm: LM, prompt: Prompt, target: Target) -> "Question":
        """Resolve it.

        Raises:
            PromptError: as in :func:`explain`.
        """
        ids, aims = checked_target(target).resolve(lm, lm.encode(prompt))
        return cls(ids, aims, target.seeds([aims], decoder_dtype(lm)))

    def tokens(self, lm: LM, gates: Gates | None = None) -> Int[Array, "1 W"]:
        """The sequence, padded behind its end if others can share its program then."""
        return right_pad([self.ids], padded_length(lm.config, len(self.ids), gates), lm.config.pad_id)


def spread(seeds: Seeds, rows: int) -> Seeds:
    """One sequence's seeds for ``rows`` copies of it."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape[1:])), seeds)


@Program
def _values(
    weights: FlatDecoder,
    tokens: Int[Array, "1 T"],
    seeds: Seeds,
    switches: dict[str, Int[Array, "M J 3"]],
    held: Gates,
) -> tuple[Float[Array, "1 N"], Float[Array, "M N"]]:
    """The targets' values without and with each intervention; the intact pass says what the best tokens are."""

    def run(
        weights: FlatDecoder, tokens: Array, seeds: Seeds, switches: dict[str, Array], held: Gates
    ) -> tuple[Array, Array]:
        decoder = unflatten(weights)
        # the first row is the intact pass
        switches = {
            name: jnp.pad(s, [(1, 0), (0, 0), (0, 0)], constant_values=_NOWHERE) for name, s in switches.items()
        }
        rows = len(next(iter(switches.values())))
        tokens, seeds = jnp.broadcast_to(tokens, (rows, tokens.shape[1])), spread(seeds, rows)
        reading = Reading(gates=_gates(decoder.config, tokens, switches).times(held))
        values = read_as_first(seeds, decoder, hidden_apart(decoder, tokens, reading), reading)[1]
        return values[:1], values[1:]

    placed = REPLICATED, REPLICATED, REPLICATED, split(0), REPLICATED
    return shard_map_data(
        run, weights.config.mesh, (weights, tokens, seeds, switches, held), placed, (REPLICATED, split(0))
    )


def hidden_apart(
    decoder: Decoder, tokens: Int[Array, "M T"], reading: Reading, embedded: Float[Array, "M T D"] | None = None
) -> Hidden:
    """``decoder.hidden``, every row by itself also where a layer lets the sequences of a batch compete."""
    if not decoder.config.couples_sequences:
        return decoder.hidden(tokens, reading=reading, embedded=embedded)
    gates = jax.tree.map(lambda g: jnp.broadcast_to(g, (len(g), len(tokens), *g.shape[2:])), reading.gates)

    def alone(tokens: Array, gates: Gates, embedded: Array | None) -> Hidden:
        own = replace(reading, gates=jax.tree.map(lambda g: g[:, None], gates))
        hidden = decoder.hidden(tokens[None], reading=own, embedded=None if embedded is None else embedded[None])
        # losses have no axis of sequences
        aux = [BlockAux(*(Aux(part.routing) for part in told)) for told in hidden.aux]
        return jax.tree.map(lambda x: x[0], hidden._replace(aux=aux))

    return jax.vmap(alone, in_axes=(0, 1, 0))(tokens, gates, embedded)


def read_as_first(
    seeds: Seeds, decoder: Decoder, hidden: Hidden, reading: Reading
) -> tuple[TargetValues, Float[Array, "M N"]]:
    """The targets of every row, their tokens those of the first: as they are differentiated, and their values.

    ``sum p z`` has the derivative of ``log sum exp z`` with ``p`` held constant; the latter is larger by the entropy.
    """
    aimed = seeds.read(decoder, hidden, reading)
    if not isinstance(seeds, LogitSeeds):
        return aimed, aimed.target
    seeds = replace(seeds, ids=jnp.broadcast_to(aimed.ids[:1], aimed.ids.shape))
    aimed = seeds.read(decoder, hidden, reading)
    return aimed, _exact(seeds, aimed)


def _gates(config: Config, tokens: Array, switches: Mapping[str, Int[Array, "M J 3"]]) -> Gates:
    """Gates that are zero at the switches, one batch row for each intervention."""
    ones, rows = Gates.ones(config, tokens), jnp.arange(len(tokens))[:, None, None]
    gates = {}
    for name, places in switches.items():
        gate = ones.ones_like(name)
        assert gate is not None
        layer, token, index = (places[..., i, None] for i in range(3))
        at = layer, rows, jnp.where(token < 0, jnp.arange(tokens.shape[1]), token), index
        # no switch has a layer beyond the last, where nothing is set
        gates[name] = gate.at[at[: gate.ndim]].set(0, mode="drop")
    return Gates(**gates)


def _exact(seeds: LogitSeeds, aimed: TargetValues) -> Float[Array, "M N"]:
    named = jnp.take_along_axis(aimed.logits, aimed.ids, axis=-1)
    several = seeds.rivals.any(-1)
    of_rivals = _entropy(jnp.where(seeds.rivals | ~several[..., None], named, -jnp.inf)) * several
    return aimed.target - of_rivals - seeds.expected * _entropy(aimed.logits)


def _entropy(logits: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    return jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1)


def _switches(
    config: Config, length: int, interventions: Sequence[Sequence[Cell]], how: str
) -> dict[str, Int[np.ndarray, "M J 3"]]:
    """Layer, token (-1 for all) and index of every cell, by field of :class:`Gates`."""
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
        for row, found in enumerate(by_row):
            out[name][row, : len(found)] = np.reshape(found, (-1, 3))
    # interventions of no cell at all
    return out or {"tokens": np.full((len(interventions), 0, 3), 0, np.int32)}


def _place(config: Config, length: int, cell: Cell, how: str) -> tuple[str, tuple[int, int, int]]:
    """The field of :class:`Gates` in which a cell lies, and where.

    Raises:
        IndexError: it lies outside the model or the prompt.
        MoejaxError: the layer has none of its kind.
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
    """Check that at every token as many experts are left as it is routed to.

    Raises:
        MoejaxError: they are not.
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
    """How many there are, and to how many a token is routed."""
    half = "attention" if cell.kind == "attention_expert" else "feed_forward"
    sizes = config.blocks[cell.layer].half(half).sizes
    if not sizes.num_experts:
        raise MoejaxError(f"layer {cell.layer} has no {cell.kind.replace('_', ' ')}s.")
    return sizes.num_experts, sizes.num_selected


def _rounded(count: int) -> int:
    """Up to a power of two, so that few numbers of cells have to be compiled."""
    return 1 << max(count - 1, 0).bit_length()


def _filled(places: np.ndarray, rows: int) -> Array:
    """``places`` with rows of no switch behind them, up to ``rows``."""
    missing = [(0, rows - len(places)), (0, 0), (0, 0)]
    return jnp.asarray(np.pad(places, missing, constant_values=_NOWHERE))
