"""From what a user gives as ``expert=`` to a stack of experts."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.feed_forward.dense import MLP
from moejax.layers.feed_forward.expert_stack import ExpertStack
from moejax.layers.feed_forward.experts import Experts
from moejax.layers.feed_forward.module_experts import ModuleExperts, is_linen, split_module

Expert = Any
"""One of what :func:`stack_experts` takes."""


def stack_experts(expert: Expert, count: int, inputs: int, outputs: int, key: PRNGKeyArray) -> ExpertStack:
    """``count`` experts from ``inputs`` to ``outputs``.

    Args:
        expert: one module, of which every expert becomes a copy (sparse upcycling); a sequence with one for each
            expert; a class or a function that makes one, called for each expert with ``rngs=`` (an ``nnx.Rngs``),
            ``key=``, or nothing, as it takes; or a stack. A module is an :class:`~moejax.layers.MLP`, or what
            :class:`~moejax.layers.ModuleExperts` takes. A module of ``flax.linen`` without variables is initialised for
            each expert.
        key: draws the weights of experts that are made here.

    Raises:
        ConfigError: they do not have the layer's widths, one architecture, or the right number, or are no modules.
    """
    stack = expert if isinstance(expert, ExpertStack) else _stacked(_instances(expert, count, inputs, key))
    if stack.num_experts != count:
        raise ConfigError(f"{stack.num_experts} experts are given for a layer of {count}.")
    if (widths := stack.widths(inputs)) != (inputs, outputs):
        raise ConfigError(f"an expert from {widths[0]} to {widths[1]} is given for a layer from {inputs} to {outputs}.")
    return stack


def _instances(expert: Expert, count: int, inputs: int, key: PRNGKeyArray) -> list[Any]:
    """A module with weights for each expert."""
    keys = [jax.random.fold_in(key, i) for i in range(count)]
    if isinstance(expert, type | FunctionType | BuiltinFunctionType | MethodType | partial):
        several = [_made(expert, k) for k in keys]
    elif isinstance(expert, Sequence | nnx.List):
        several = list(expert)
    else:
        several = [expert] * count
    if len(several) != count:
        raise ConfigError(f"{len(several)} experts are given for a layer of {count}.")
    return [_with_weights(module, inputs, k) for module, k in zip(several, keys, strict=True)]


def _made(factory: Callable[..., Any], key: PRNGKeyArray) -> Any:
    """What the factory makes with randomness of this key."""
    parameters = _parameters(factory)
    sources: dict[str, Callable[[], Any]] = {"rngs": lambda: nnx.Rngs(key), "key": lambda: key}
    given = {p.name: sources[p.name]() for p in parameters if p.name in sources}
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional and p.name not in given]
    if needed:
        name = getattr(factory, "__name__", repr(factory))
        raise ConfigError(
            f"expert={name} is called with rngs or key alone, but also needs {', '.join(needed)}; give these with "
            f"functools.partial."
        )
    return factory(**given)


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that are not given yet."""
    if isinstance(factory, partial):
        parameters = _parameters(factory.func)
        given = inspect.Signature(parameters).bind_partial(*factory.args, **factory.keywords).arguments
        return [p for p in parameters if p.name not in given]
    if isinstance(factory, type):
        # the metaclass of nnx hides the parameters of the constructor
        return list(inspect.signature(factory.__init__).parameters.values())[1:]
    return list(inspect.signature(factory).parameters.values())


def _with_weights(module: Any, inputs: int, key: PRNGKeyArray) -> Any:
    """The module itself; of ``flax.linen`` without variables, with weights of this key."""
    if not is_linen(module) or module.scope is not None:
        return module
    return module.bind(module.init(key, jnp.zeros((1, inputs))))


def _stacked(several: list[Any]) -> ExpertStack:
    """One stack of several modules of one architecture."""
    differ = ConfigError("the experts that are given differ in their architecture; one stack needs one.")
    if all(isinstance(e, MLP) for e in several):
        if len({e.config for e in several}) > 1:
            raise differ
        stacked: MLP = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
        unit = several[0].config.unit
        return Experts(stacked.gate_up, stacked.down, stacked.gate_up_bias, stacked.down_bias, unit)
    parts = [split_module(e) for e in several]
    definition, weights = parts[0]
    shapes = {name: leaf.shape for name, leaf in weights.items()}
    if any(d != definition or {n: leaf.shape for n, leaf in w.items()} != shapes for d, w in parts):
        raise differ
    return ModuleExperts({name: jnp.stack([w[name] for _, w in parts]) for name in weights}, definition)
