"""Checks every annotated argument, result and field of ``moejax`` at run time: jaxtyping's shapes, beartype's types.

``conftest.py`` names :func:`check` to jaxtyping's import hook, which applies it to every function of the package.
"""

from collections.abc import Callable
from typing import Self

from beartype import BeartypeConf, FrozenDict, beartype

# JAX rebuilds these from leaves that are no arrays yet (placeholders, avals) or that have grown an axis under ``vmap``,
# and calls their constructors to do so.
PYTREE_CONSTRUCTORS = {
    "moejax.generation.decode._Call.__init__",
    "moejax.models.activations._Inputs.__init__",
    "moejax.models.flat.FlatDecoder.__init__",
    "moejax.ops.experts.dispatch.assignment.Assignment.__init__",
    "moejax.models.flat.FlatDecoder.tree_flatten",
    "moejax.ops.int8.Int8.__init__",
    "moejax.ops.mxfp4.MXFP4.__init__",
    "moejax.relevance.ablate.AblationInputs.__init__",
    "moejax.relevance.ablate.AblationValues.__init__",
    "moejax.relevance.engine.PassInputs.__init__",
    "moejax.relevance.engine.Readout.__init__",
    "moejax.relevance.seeds.LogitSeeds.__init__",
    "moejax.relevance.targets.direction.StreamSeeds.__init__",
    "moejax.relevance.targets.router_choice.RoutingSeeds.__init__",
    "moejax.rules.gates.Gates.__init__",
    "moejax.rules.reading.Reading.__init__",
}


def check(function: Callable) -> Callable:
    """``function`` with its types checked at every call."""
    name = f"{function.__module__}.{function.__qualname__}"
    if name in PYTREE_CONSTRUCTORS:
        return function
    return beartype(conf=_resolving_self(name))(function)


def _resolving_self(name: str) -> BeartypeConf:
    """The hook decorates methods one by one, so beartype has to be told which class ``Self`` is."""
    owner = name.rpartition(".")[0]
    return BeartypeConf() if "<locals>" in owner else BeartypeConf(hint_overrides=FrozenDict({Self: owner}))
