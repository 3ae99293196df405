"""MoE layers by name: what a configuration's ``moe`` field and ``--moe-name`` may say."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from moejax.errors import ConfigError

if TYPE_CHECKING:
    from moejax.layers.feed_forward.dense import MLP
    from moejax.layers.feed_forward.moe_layer import MoeArgs, MoeLayer

Layer = TypeVar("Layer", bound="type[MoeLayer]")
_LAYERS: dict[str, type[MoeLayer]] = {}


def register_moe(*names: str) -> Callable[[Layer], Layer]:
    """Class decorator: register a subclass of :class:`MoeLayer` under each of ``names``; returns the class.

    Registering a class of the same module and name again replaces it, as running a notebook's cell twice does.

    Raises:
        ConfigError: another class has the name, or there is no name at all.
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError('name the layer: @register_moe("my_moe").')

    def register(layer: Layer) -> Layer:
        for name in names:
            other = _LAYERS.get(name)
            if other is not None and _origin(other) != _origin(layer):
                raise ConfigError(f"an MoE layer {name!r} is registered already: {'.'.join(_origin(other))}.")
        _LAYERS.update(dict.fromkeys(names, layer))
        return layer

    return register


def get_moe(name: str) -> type[MoeLayer]:
    """The class registered under ``name``.

    Raises:
        ConfigError: there is none; the message lists what exists.
    """
    known = registered()
    if name not in known:
        raise ConfigError(f"no MoE layer {name!r} is registered; registered are: {', '.join(known)}.")
    return known[name]


def registered() -> dict[str, type[MoeLayer]]:
    """All registered layers by name, those of ``layers/variants`` among them."""
    from moejax.layers.feed_forward import variants

    for module in pkgutil.iter_modules(variants.__path__):
        importlib.import_module(f"{variants.__name__}.{module.name}")
    return dict(sorted(_LAYERS.items()))


def _origin(layer: type) -> tuple[str, str]:
    return layer.__module__, layer.__qualname__


@dataclass(frozen=True)
class RegisteredConfig:
    """A registered layer as the feed-forward part of a decoder's block.

    Attributes:
        name: what it is registered under.
        args: settings as :class:`MoeArgs` takes them; by default the class's own.
        mesh: devices over which the weights lie, if there are several; over its axis ``expert`` experts are split.

    Raises:
        ConfigError: no such layer, or settings that it does not have.
    """

    name: str
    model_dim: int
    num_experts: int
    num_selected: int
    args: Any = field(default=None)
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", get_moe(self.name).Args.of(self.args))
        self.abstract  # noqa: B018 - settings that do not fit raise here

    def init(self, key: PRNGKeyArray | None, expert: MLP | Sequence[MLP] | None = None) -> MoeLayer:
        """The layer with random weights in float32; ``expert`` as :class:`MoeLayer` takes it."""
        args: MoeArgs = replace(self.args, key=key)
        layer = get_moe(self.name)(
            self.model_dim, self.model_dim, self.num_experts, self.num_selected, expert, args=args
        )
        layer.mesh = self.mesh
        return layer

    @property
    def num_ids(self) -> int:
        """Experts that a token may be routed to."""
        return self.abstract.num_ids

    @property
    def num_null(self) -> int:
        """Of these how many, the last, are null routes."""
        return self.abstract.num_null

    @property
    def couples_sequences(self) -> bool:
        """Whether what a sequence yields depends on the others of its batch."""
        return self.abstract.couples_sequences

    @property
    def num_routed(self) -> int:
        """Experts with weights that a token may be routed to."""
        return self.abstract.num_routed

    @property
    def num_slots(self) -> int:
        """Slots of a token."""
        return self.abstract.num_slots

    @property
    def num_shared(self) -> int:
        """Shared experts under the gate ``shared``."""
        return self.abstract.num_shared

    @property
    def shared_dim(self) -> int:
        """Hidden units of the shared experts."""
        return self.abstract.shared_dim

    @property
    def expert_dim(self) -> int:
        """Hidden units of an expert."""
        return self.abstract.experts.output.shape[-1]

    @property
    def packed(self) -> bool:
        """Never held as MXFP4."""
        return False

    @property
    def abstract(self) -> MoeLayer:
        """The layer with shapes for arrays."""
        return _abstract(self)


@cache
def _abstract(config: RegisteredConfig) -> MoeLayer:
    return jax.eval_shape(lambda: config.init(None))
