"""Packed formats: weights that are held in few bits and unpacked when a step uses them.

A format is a subclass of :class:`Packed`, a pytree, registered under a name by :func:`register_format`. It says how its
values are unpacked, which arrays hold them and how these lie over devices, and so its bytes. The grouped matmul
multiplies with any format: implementations unpack one layer at a time (:func:`unpack_in_turn`), unless one is
registered for the format itself (:func:`moejax.ops.experts.register_matmul`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.registry import Registry

Axes = tuple[str | None, ...]
Format = TypeVar("Format", bound="type[Packed]")


class Packed(ABC):
    """An array of shape ``[*s, D]`` in a packed format: a frozen dataclass of arrays that begin with the axes ``*s``.

    Attributes:
        value_dtype: the narrowest dtype that represents the values exactly.
        is_published: checkpoints hold weights in this format, so that export may write it.
    """

    value_dtype: ClassVar[Any]
    is_published: ClassVar[bool]

    @classmethod
    @abstractmethod
    def random(cls, key: PRNGKeyArray, shape: tuple[int, ...]) -> Self:
        """Draw an array of shape ``shape`` with standard deviation 0.02."""

    @classmethod
    def of(cls, values: Float[Array, "..."]) -> Self:
        """Pack values, with an error; only for formats that are not published.

        Raises:
            ConfigError: weights are packed in this format before they are published.
        """
        del values
        raise ConfigError(f"weights are published as {cls.__name__} or not; they cannot be made so.")

    @classmethod
    @abstractmethod
    def leaf_axes(cls, axes: Axes) -> dict[str, Axes]:
        """Return the logical axes of the arrays by name, from those of the unpacked array."""

    @classmethod
    def check(cls, *widths: int) -> None:
        """Raise ``ConfigError`` if rows of one of these widths cannot be packed; by default all can."""
        del widths

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked array."""

    @property
    def ndim(self) -> int:
        """Number of axes of the unpacked array."""
        return len(self.shape)

    @abstractmethod
    def __abs__(self) -> Self:
        """The absolute values, packed too."""

    @abstractmethod
    def unpack(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The values, rounded to ``dtype``."""

    def __getitem__(self, index: Any) -> Self:
        """Index the leading axes; the result is packed too."""
        return jax.tree.map(lambda leaf: leaf[index], self)


FORMATS: Registry[type[Packed]] = Registry("packed format", error=ConfigError)
"""Packed formats by name."""


def register_format(name: str) -> Callable[[Format], Format]:
    """Class decorator that enters a subclass of :class:`Packed` under ``name``.

    Raises:
        ConfigError: another class has the name.
    """
    return FORMATS.register(name)


def is_packed(x: Any) -> bool:
    """Return whether ``x`` is packed, for ``is_leaf`` of functions on trees."""
    return isinstance(x, Packed)


def with_packed_axes(axes: dict[str, Axes]) -> dict[str, Axes]:
    """Return logical axes of leaves by path, and those of the arrays that hold them in each registered format."""
    packed = {
        f"{path}.{name}": leaf_axes
        for path, whole in axes.items()
        for packed_format in FORMATS.values()
        for name, leaf_axes in packed_format.leaf_axes(whole).items()
    }
    return axes | packed


def unpack_in_turn(x: Array, weight: Array | Packed) -> tuple[Array, Array]:
    """Return ``x``, and the matrix in the dtype of ``x``, unpacked for this product alone.

    XLA must not unpack before ``x`` has been computed. Otherwise it would unpack all layers at once, or keep the
    unpacked matrices of the forward pass for the backward pass.
    """
    if not isinstance(weight, Packed):
        return x, weight
    x, packed = jax.lax.optimization_barrier((x, weight))
    return x, packed.unpack(x.dtype)
