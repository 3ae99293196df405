"""Logits and values at nodes of one forward pass under gates and edits, for ``jit``, ``grad`` and ``vmap``."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import PromptError
from moejax.models.data_parallel import (
    REPLICATED,
    Placement,
    batch_mesh,
    gate_specs,
    placed,
    placements,
    shard_map_data,
    split,
)
from moejax.models.decoder import Decoder
from moejax.models.flat import FlatDecoder, unflatten
from moejax.models.node_table import checked_edits, node_names
from moejax.models.padding import warn_beyond_context
from moejax.program import Program
from moejax.rules import Edits, Gates, Plain, Reading, Rule

Values = dict[str, Array]
"""Values at nodes by their full names; ``moejax.nodes(lm)`` has the shapes."""


def edit_specs(edits: Edits) -> Placement:
    """Return the placements of checked edits where devices split sequences: some values differ by sequence."""
    whole = jax.tree.map(lambda _: REPLICATED, edits)
    specs = [split(0) if edit.value.shape[0] > 1 else REPLICATED for edit in edits.edits]
    rest = iter(specs)
    return whole.with_values(lambda _: next(rest))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Inputs:
    """The arguments of a pass, each with its placement where devices split sequences."""

    decoder: Decoder | FlatDecoder = placed()
    tokens: Int[Array, "B T"] = placed(sequences=0)
    valid: Bool[Array, "B T"] | None = placed(sequences=0)
    gates: Gates = placed(sequences=gate_specs)
    edits: Edits = placed(sequences=edit_specs)


def apply(
    decoder: Decoder | FlatDecoder,
    tokens: Int[Array, "B T"],
    *,
    gates: Gates | None = None,
    edits: Edits | None = None,
    names: str | Sequence[str] = (),
    rule: Rule = Plain(),
    valid: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, "B T V"], Values]:
    """Compute logits and the values at nodes: the pure form of ``lm(..)`` and ``lm.run_with_cache(..)``.

    It may stand under ``jax.jit`` (with ``names`` and ``rule`` static), ``jax.grad`` by decoder, gates and the values
    of edits, and ``jax.vmap``. Without edits and names it is the plain forward pass.

    Args:
        decoder: the weights, ``lm.decoder``.
        tokens: token ids, which are not checked.
        gates: interventions.
        edits: changes of values at nodes. Without padding before the tokens, their number of a token is its place.
        names: the nodes to return: full names (``"stream.3"``), names for all layers (``"router_logits"``), or patterns
            (``"*.3"``). Values come in the model's dtype, those of routers and attention patterns in float32.
        rule: rule of the backward pass; by default calculus.
        valid: true for tokens that are not padding, ``[B T]`` or ``[1 T]``; all by default.

    Returns:
        Next-token logits in float32, and the values by full name.

    Raises:
        PromptError: the model has no such node.
        MoejaxError: gates or edits that do not fit the model or the tokens, or a layer that does not pass a node.
    """
    config, shape = decoder.config, (tokens.shape[0], tokens.shape[1])
    gates = Gates() if gates is None else gates
    edits = checked_edits(config, edits, shape)
    found = node_names(config, names)

    def run(inputs: _Inputs) -> tuple[Array, Values]:
        whole, reading = unflatten(inputs.decoder), Reading(rule, inputs.gates, edits=inputs.edits, names=found)
        hidden = whole.hidden(inputs.tokens, valid=inputs.valid, reading=reading)
        return whole.logits(hidden.stream, reading), dict(hidden.nodes)

    inputs = _Inputs(decoder, tokens, valid, gates, edits)
    return shard_map_data(run, batch_mesh(config), (inputs,), (placements(inputs, "sequences"),), split(0))


run_apply = Program(apply, static_argnames=("names", "rule"))
""":func:`apply` as one compiled program."""


def checked_apply(
    decoder: Decoder | FlatDecoder,
    tokens: Int[np.ndarray, "*B T"],
    *,
    valid: Any = None,
    gates: Gates | None = None,
    edits: Edits | None = None,
    names: str | Sequence[str] = (),
) -> tuple[Float[Array, "B T V"], Values]:
    """Check what a person gave, and run :func:`apply` as one program for all positions that edits name.

    Args:
        tokens: token ids within the vocabulary. One row without a batch axis is taken as a batch of one.

    Raises:
        PromptError: ``valid`` of another shape than the tokens, or no such node.
        MoejaxError: gates or edits that do not fit the model or the tokens.
    """
    rows = jnp.atleast_2d(tokens)
    valid = None if valid is None else jnp.atleast_2d(jnp.asarray(valid, bool))
    if rows.ndim != 2 or (valid is not None and valid.shape not in (rows.shape, (1, rows.shape[1]))):
        shapes = rows.shape if valid is None else f"{rows.shape} with `valid` of shape {valid.shape}"
        raise PromptError(f"token ids of shape {shapes}: both are [B T].")
    warn_beyond_context(decoder.config, rows.shape[1])
    gates = None if gates is None else gates.check(decoder.config, rows)
    edits = checked_edits(decoder.config, edits, (rows.shape[0], rows.shape[1])).as_data()
    found = node_names(decoder.config, names)
    logits, values = run_apply(decoder, rows, valid=valid, gates=gates, edits=edits, names=found)
    return logits, {name: values[name] for name in found}  # jit sorts keys


def record(
    decoder: Decoder, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"] | None, nodes: Sequence[str]
) -> tuple[Mapping[str, Float[Array, "..."]], Float[Array, "B T D"]]:
    """Return the values at ``nodes`` in float32 or wider, and the residual stream after the last layer.

    It is the earlier form of :func:`apply`, kept for one version.
    """
    warnings.warn("models.record is now moejax.apply(decoder, tokens, names=..).", DeprecationWarning, stacklevel=2)
    reading = Reading(names=node_names(decoder.config, nodes))
    hidden = decoder.hidden(tokens, valid=valid, reading=reading)
    return widened(hidden.nodes), hidden.stream


def widened(values: Mapping[str, Array]) -> Values:
    """Return values at nodes in float32 or wider; ids stay integers."""
    return {
        name: value.astype(jnp.promote_types(value.dtype, jnp.float32)) if value.dtype.kind != "i" else value
        for name, value in values.items()
    }
