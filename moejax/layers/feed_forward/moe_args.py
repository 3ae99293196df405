"""Settings of a registered layer, under LibMoE's names where it has one."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import jax
from jaxtyping import PRNGKeyArray

from moejax.errors import ConfigError
from moejax.routing.losses import Count, Scope


@dataclass(frozen=True)
class MoeArgs:
    """Settings of a layer. A variant adds its own in a subclass.

    Attributes:
        balance_loss_coef, router_z_loss_coef: weights of the two losses in the layer's auxiliary loss.
        init_weight: initial weights are normal with a small standard deviation; else uniform in ``1 / sqrt(inputs)``.
        std_gate, std_expert: these standard deviations for the router and the experts.
        balance_scope, balance_count: as in :func:`moejax.routing.balance_loss`.
        capacity_factor: an expert takes at most this many times its fair share of a batch's slots, ``K`` for a token;
            later slots are dropped, and counted as ``dropped``. By default none is ever dropped.
        expert_dim: hidden units of an expert; by default the layer's output width.
        activation, gated, expert_bias: what experts compute, where no ``expert`` is given.
        compat: ``"libmoe"`` computes what LibMoE's vision-language stack computes, where it differs from the
            published method.
        key: draws initial weights and is not kept. Every layer of a decoder is given its own.

    Raises:
        ConfigError: an unknown ``compat``, or a ``capacity_factor`` that is not positive.
    """

    balance_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    init_weight: bool = True
    std_gate: float = 0.02
    std_expert: float = 0.02
    balance_scope: Scope = "batch"
    balance_count: Count = "selected"
    capacity_factor: float | None = None
    expert_dim: int | None = None
    activation: str = "gelu"
    gated: bool = False
    expert_bias: bool = True
    compat: Literal["libmoe"] | None = None
    key: PRNGKeyArray | None = field(default=None, repr=False, compare=False)

    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Settings of the base class that a variant does not read, so that setting them would do nothing."""

    def __post_init__(self) -> None:
        if self.compat not in (None, "libmoe"):
            raise ConfigError(f"compat={self.compat!r} is unknown; it is None or 'libmoe'.")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(f"capacity_factor={self.capacity_factor} must be positive; None never drops a token.")

    def draw(self, name: str) -> PRNGKeyArray:
        """A key for the parameter of that name; without :attr:`key` always the same."""
        return jax.random.fold_in(jax.random.key(0) if self.key is None else self.key, zlib.crc32(name.encode()))

    @classmethod
    def of(cls, args: Any) -> Self:
        """Settings from an object of this class, a mapping of its fields, or any object with some of them.

        Raises:
            ConfigError: a mapping has a field that this class does not have.
        """
        known = {f.name for f in fields(cls)}
        if args is None or isinstance(args, cls):
            return args or cls()
        if isinstance(args, Mapping):
            if unknown := sorted(set(args) - known):
                raise ConfigError(f"{cls.__name__} has no {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")
            return cls(**args)
        return cls(**{name: getattr(args, name) for name in known if hasattr(args, name)})
