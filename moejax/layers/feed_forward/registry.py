"""Mixtures by name: what a configuration's ``moe`` field and ``--moe-name`` may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.feed_forward.mixture import mixture_activations
from moejax.layers.parts import ActivationSizes, Axes, PartConfig, Sizes, cast
from moejax.registry import Registry

if TYPE_CHECKING:
    from moejax.layers.feed_forward.initial_experts import Expert
    from moejax.layers.feed_forward.moe_layer import MoeArgs, MoeLayer

Layer = TypeVar("Layer", bound="type[MoeLayer]")
LAYERS: Registry[type[MoeLayer]] = Registry("MoE layer", "moejax.layers.feed_forward.variants", ConfigError)
"""Registered layers by name."""


def register_moe(*names: str) -> Callable[[Layer], Layer]:
    """Class decorator: register a subclass of :class:`MoeLayer` under each of ``names``; returns the class.

    Registering a class of the same module and name again replaces it, as running a notebook's cell twice does.

    Raises:
        ConfigError: another class has the name, or there is no name at all.
    """
    return LAYERS.register(*names)


def get_moe(name: str) -> type[MoeLayer]:
    """The class registered under ``name``.

    Raises:
        ConfigError: there is none; the message lists what exists.
    """
    return LAYERS.find(name)


def registered() -> dict[str, type[MoeLayer]]:
    """All registered layers, in the order of their names."""
    return dict(sorted(LAYERS.items()))


@dataclass(frozen=True)
class RegisteredConfig(PartConfig):
    """A registered layer as the feed-forward part of a decoder's block.

    Attributes:
        name: the name it is registered under.
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

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> MoeLayer:
        return cast(self.build(key), dtype)

    def build(self, key: PRNGKeyArray | None, expert: Expert | None = None) -> MoeLayer:
        """The layer with random weights in float32.

        Args:
            expert: initial experts, as :class:`MoeLayer` takes them.
        """
        args: MoeArgs = replace(self.args, key=key)
        layer = get_moe(self.name)(
            self.model_dim, self.model_dim, self.num_experts, self.num_selected, expert, args=args
        )
        return layer if self.mesh is None else layer.on_mesh(self.mesh)

    @property
    def abstract(self) -> MoeLayer:
        """The layer with shapes in place of arrays."""
        return _abstract(self)

    @property
    def sizes(self) -> Sizes:
        return self.abstract.sizes

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Experts are split as everywhere; whatever else a registered layer has lies on every device."""
        experts = {f"experts.{path}": axes for path, axes in self.abstract.experts.axes.items()}
        return experts | {"router.weight": (None, None), "router.selection_bias": (None,)}

    @property
    def leaks(self) -> frozenset[str]:
        return self.abstract.experts.leaks

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        sizes, experts = self.sizes, self.abstract.experts
        if not sizes.expert_dim:
            # of experts that do not tell, as many hidden units as a dense layer with their weights would have
            weights = sum(leaf.size for leaf in jax.tree.leaves(experts)) // experts.num_experts
            sizes = replace(sizes, expert_dim=max(1, weights // (2 * self.model_dim)))
        return mixture_activations(sizes, self.model_dim, batch * tokens, itemsize)

    def on_mesh(self, mesh: Mesh | None) -> Self:
        return replace(self, mesh=mesh)


@cache
def _abstract(config: RegisteredConfig) -> MoeLayer:
    return jax.eval_shape(lambda: config.build(None))
