"""An object of a config, whose keys are read each with its kind."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.errors import ConfigError, one_line
from moejax.models.kinds import FLAG, SIZE, SIZES, Kind

_REQUIRED = object()
"""Stands for the default of a key that must be present."""

_NAMED = 8
"""The most keys that a message names."""


class ObjectFields:
    """The keys of an object; each is marked as read when it is asked for.

        >>> fields = ObjectFields({"rope_type": "linear", "factor": 4}, "rotary positions of type 'linear'")
        >>> fields("factor", NUMBER)
        4.0
        >>> fields("low_freq_factor", NUMBER)
        Traceback (most recent call last):
        moejax.errors.ConfigError: rotary positions of type 'linear' need 'low_freq_factor', which the config lacks.

    Args:
        config: the object.
        what: what it is, as messages name it.
    """

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        self._config = dict(config)
        self._read: set[str] = set()
        self._what = what

    @property
    def _where(self) -> str:
        """What a message says behind a key."""
        return f" of {self._what}"

    def __call__(self, name: str, kind: Kind, default: Any = _REQUIRED, *, alias: str | None = None) -> Any:
        """Return a field; one that is ``None`` counts as absent.

        Args:
            name: the name of the field.
            kind: of which kind it is.
            default: the value if the field is absent; by default it must be present, unless :meth:`_default` knows one.
            alias: the name of the field in other versions of transformers.

        Raises:
            ConfigError: the field is of another kind, or it is absent and there is no default.
        """
        for key in (name, alias):
            if key is not None:
                self._read.add(key)
                if self._config.get(key) is not None:
                    return kind.read(key, self._config[key], self._where)
        return self._default(name) if default is _REQUIRED else default

    def _default(self, name: str) -> Any:
        """Return the value of a field that is absent and whose caller knows no default; raise if there is none."""
        raise ConfigError(f"{self._what} need {name!r}, which the config lacks.")

    def size(self, name: str, default: Any = _REQUIRED, *, alias: str | None = None) -> Any:
        """Return a field that must be a positive integer; arguments and errors are as in :meth:`__call__`."""
        return self(name, SIZES.get(name, SIZE), default, alias=alias)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a field that must be true or false; arguments and errors are as in :meth:`__call__`."""
        return self(name, FLAG, default)

    def without_effect(self, *names: str) -> None:
        """Mark fields as read that change nothing in this family, whatever they are."""
        self._read |= set(names)

    def must_be(self, name: str, expected: Any) -> None:
        """Accept the field ``name`` only if it is absent or equal to ``expected``.

        Raises:
            ConfigError: the field has another value, which would change the model in a way that is not implemented.
        """
        self._read.add(name)
        if (value := self._config.get(name)) is not None and value != expected:
            raise ConfigError(f"config field {name}={value!r:.80} is not supported, only {expected!r} is.")

    def _unread(self) -> dict[str, Any]:
        """The fields that are given and that nobody asked for."""
        return {k: v for k, v in self._config.items() if k not in self._read and v is not None}

    def finish(self) -> None:
        """Check what was not read: transformers ignores such keys, so they are named in a warning.

        Raises:
            ConfigError: one of them is an object, which may hold the values of some layers.
        """
        unread = self._unread()
        refuse({k: v for k, v in unread.items() if isinstance(v, Mapping)})
        tell_of(list(unread), f"{self._what} have keys that change nothing")


def refuse(unknown: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if there are fields that were not read and may change the model."""
    if unknown:
        listed = _listed([f"{k:.80}={v!r:.80}" for k, v in sorted(unknown.items())])
        raise ConfigError(f"this family does not know these config fields, which may change the model: {listed}.")


def tell_of(notes: Sequence[str], what: str) -> None:
    """Name fields that change nothing in a warning, if there are any."""
    if notes:
        warnings.warn(one_line(f"{what} and are kept: {_listed(sorted(notes))}."), stacklevel=3)


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many there are beside them."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"{name:.200}" for name in names[:_NAMED]) + more
