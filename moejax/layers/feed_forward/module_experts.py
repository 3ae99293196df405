"""Experts that are somebody else's module: of Flax, a registered pytree, or a plain class that is called.

The weights of ``E`` modules are stacked, and one definition, which is static, computes each expert from its own.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax.errors import ConfigError
from moejax.layers.feed_forward.expert_stack import ExpertStack, by_token, rows_of
from moejax.layers.parts import Axes
from moejax.ops.experts import Assignment, grouped_map, unpermute
from moejax.rules import Reading

Weights = dict[str, Array]
"""The weights of one expert or of several, by their dotted names in the module."""


@dataclass(frozen=True)
class ModuleDefinition:
    """What a module computes from its weights. Equal for modules that differ in the values of their weights alone.

    Attributes:
        title: name of the module's class.
        structure: the tree of the weights.
        names: dotted names of its leaves, in order.
        call: computes ``[N O]`` from that tree and ``x [N D]``.
    """

    title: str
    structure: Any
    names: tuple[str, ...]
    call: Callable[[Any, Array], Any]

    def __call__(self, weights: Weights, x: Float[Array, "N D"]) -> Any:
        """What the module returns for ``x``, which is ``[N O]`` if it is an expert."""
        return self.call(jax.tree.unflatten(self.structure, [weights[name] for name in self.names]), x)


@nnx.dataclass
class ModuleExperts(ExpertStack):
    """Experts that are modules, called with any number of tokens ``[N D]`` and returning ``[N O]``.

    A module has weights and nothing else that changes (no dropout, no running statistics), and treats each token by
    itself: it is also given rows of other tokens, whose outputs are not read.

    Relevance passes through a module by calculus, whatever the rule: nothing is known of the steps within. What
    calculus does not conserve there, the ledger books as ``expert``. Gates, edits and the node ``expert_outputs`` are
    as for every expert; there are no ``neurons``.

    Attributes:
        weights: ``[E ..]`` each, by the dotted names that they have in the module (``up.kernel``).
        definition: what a module computes from its own weights.
    """

    weights: dict[str, Float[Array, "E ..."]] = nnx.data()
    definition: ModuleDefinition = nnx.static()

    leaks: ClassVar[frozenset[str]] = frozenset({"expert"})

    @classmethod
    def of(cls, module: Any) -> "ModuleExperts":
        """Experts from one module whose weights are stacked already, as ``jax.vmap`` over its construction makes it.

        Raises:
            ConfigError: it is no module, holds something else than weights, or weights of no equal first axis.
        """
        definition, weights = split_module(module)
        counts = {leaf.shape[:1] for leaf in weights.values()}
        if len(counts) != 1 or () in counts:
            raise ConfigError(f"the weights of {definition.title} are not stacked: their first axes differ.")
        return cls(weights, definition)

    def widths(self, inputs: int) -> tuple[int, int]:
        """Widths ``D`` and ``O``: ``inputs``, and what the module returns for it.

        Raises:
            ConfigError: the module does not take that width, or returns something else than ``[N O]``.
        """
        one = {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in self.weights.items()}
        dtype = jnp.result_type(*self.weights.values())
        title, tokens = self.definition.title, 3
        try:
            result = jax.eval_shape(self.definition, one, jax.ShapeDtypeStruct((tokens, inputs), dtype))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"an expert {title} does not take [N, {inputs}]: {reason}") from error
        shape = getattr(result, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != tokens:
            returned = type(result).__name__ if shape is None else f"the shape {list(shape)}"
            raise ConfigError(
                f"an expert {title} maps [N, D] to [N, O]; for [{tokens}, {inputs}] it returned {returned}."
            )
        return inputs, shape[1]

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Experts lie on the axis ``expert``; within an expert nothing is split."""
        return {f"weights.{name}": ("expert", *[None] * (leaf.ndim - 1)) for name, leaf in self.weights.items()}

    def slots(self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        """Outputs of the slots that are assigned to these experts; zero for all others."""
        rows, in_rows = rows_of(x, assignment, reading, copied=False)

        def run(rows: Array) -> Array:
            return grouped_map(self.definition, self.weights, rows, assignment).astype(rows.dtype)

        return by_token(unpermute(in_rows.book("expert", run, rows), assignment), x)

    def summed(self, times: int) -> "SumOfModules":
        """The dense layer that adds up the outputs of all experts, ``times`` times."""
        return SumOfModules(self, times)


@nnx.dataclass
class SumOfModules(nnx.Module):
    """A dense layer: ``times`` the sum of the outputs of some modules, each of which sees every token."""

    experts: ModuleExperts = nnx.data()
    times: int = nnx.static()

    hidden_dim: ClassVar[int] = 0

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T O"]:
        definition, weights = self.experts.definition, self.experts.weights

        def run(x: Array) -> Array:
            outputs = jax.vmap(definition, (0, None))(weights, x.reshape(-1, x.shape[-1]))
            return (self.times * outputs.sum(0)).reshape(*x.shape[:-1], -1).astype(x.dtype)

        return reading.book("expert", run, x)


# ---- a module as its definition and its weights --------------------------------------------------------------------


def split_module(module: Any) -> tuple[ModuleDefinition, Weights]:
    """What a module computes, and its weights by their names.

    Args:
        module: of ``flax.nnx``, of ``flax.linen`` with its variables (``bind``), a registered pytree, or an object of a
            plain class whose attributes are arrays (or pytrees of them) and settings.

    Raises:
        ConfigError: it cannot be called, or holds something that is neither a weight nor a setting.
    """
    title = type(module).__name__
    if not callable(module):
        raise ConfigError(f"expert={module!r} cannot be called; an expert is a module that maps [N, D] to [N, O].")
    tree, call = _tree_and_call(module, title)
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    # a variable of nnx holds its array under this name
    names = tuple(jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value") for p, _ in found)
    weights = {name: leaf for name, (_, leaf) in zip(names, found, strict=True)}
    if not weights:
        raise ConfigError(f"an expert {title} has no weights; a class or function is called to make one.")
    for name, leaf in weights.items():
        if not jnp.issubdtype(getattr(leaf, "dtype", None) or object, jnp.floating):
            raise ConfigError(f"an expert holds weights alone; {title} has {name}, {_kind(leaf)}.")
    if len(weights) < len(names) or len({id(leaf) for leaf in weights.values()}) < len(names):
        raise ConfigError(f"{title} has one weight in two places, which would not stay equal in training.")
    return ModuleDefinition(title, structure, names, call), {n: jnp.asarray(leaf) for n, leaf in weights.items()}


def _tree_and_call(module: Any, title: str) -> tuple[Any, Callable[[Any, Array], Any]]:
    if isinstance(module, nnx.Module):
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            if isinstance(variable, nnx.Variable) and not isinstance(variable, nnx.Param):
                name, kind = ".".join(map(str, path)), type(variable).__name__
                raise ConfigError(f"an expert holds weights alone; {title} has {name}, a {kind}: leave it out.")
        return module, _call_tree
    if is_linen(module):
        if module.scope is None:
            raise ConfigError(f"{title} has no weights yet: bind its variables, or let the layer draw them.")
        unbound, variables = module.unbind()
        if others := sorted(set(variables) - {"params"}):
            raise ConfigError(f"an expert holds weights alone; {title} has {', '.join(others)}: leave it out.")
        return variables["params"], _CallLinen(unbound)
    if jax.tree_util.all_leaves([module]):
        arrays, settings = {}, []
        for name, value in getattr(module, "__dict__", {}).items():
            leaves = jax.tree.leaves(value)
            if leaves and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
                arrays[name] = value
            elif all(isinstance(leaf, _SETTINGS) for leaf in leaves):
                settings.append((name, value))
            else:
                raise ConfigError(
                    f"{title}.{name} is neither an array nor a setting; make {title} a flax.nnx.Module, whose weights "
                    "are found."
                )
        return arrays, _CallPlain(type(module), tuple(settings))
    return module, _call_tree


_SETTINGS = (bool, int, float, str, bytes, np.dtype, type, FunctionType, BuiltinFunctionType, enum.Enum, partial)


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"of dtype {dtype}" if dtype is not None else f"a {type(leaf).__name__}"


def is_linen(module: Any) -> bool:
    """Return whether it is a module of ``flax.linen``, bound or not."""
    return isinstance(module, _linen_module())


@cache
def _linen_module() -> type:
    # imported late: few need it
    from flax import linen

    return linen.Module


def _call_tree(module: Any, x: Array) -> Any:
    return module(x)


@dataclass(frozen=True)
class _CallLinen:
    module: Any

    def __call__(self, params: Any, x: Array) -> Any:
        return self.module.apply({"params": params}, x)


@dataclass(frozen=True)
class _CallPlain:
    cls: type
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, arrays: dict[str, Any], x: Array) -> Any:
        module = object.__new__(self.cls)
        vars(module).update(self.settings, **arrays)
        return module(x)
