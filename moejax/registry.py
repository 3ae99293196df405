"""Tables of things that have a name: families, layers, rules, baselines, targets, plots and implementations of ops.

One mechanism serves them all. A decorator enters what it decorates; a file in the table's package is found by being
there, without an entry anywhere else; and a file outside of the package that uses the same decorator is as good.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from moejax.errors import ConfigError, MoejaxError

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A table from names to entries.

    Args:
        kind: what an entry is, in error messages: ``"rule"``.
        package: package whose modules are imported before the table is read, so that they enter what they define.
            Modules whose names begin with an underscore are left out.
        error: the exception that :meth:`find` raises.
    """

    def __init__(self, kind: str, package: str | None = None, error: type[MoejaxError] = MoejaxError) -> None:
        self.kind, self._package, self._error = kind, package, error
        self._entries: dict[str, Entry] = {}
        self._origins: dict[str, tuple[str, str]] = {}
        self._discovered = package is None

    def add(self, name: str, entry: Entry, origin: Any = None) -> None:
        """Enter ``entry`` under ``name``.

        A class or function of the same module and name replaces its earlier self, as running a notebook's cell twice
        does.

        Args:
            origin: the class or function that the entry was made from; by default the entry itself.

        Raises:
            ConfigError: the name is no string, or something else has it.
        """
        where = _origin(entry if origin is None else origin)
        self._check_free(name, where)
        self._entries[name], self._origins[name] = entry, where

    def _check_free(self, name: Any, where: tuple[str, str]) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"give the {self.kind} a name, not {name!r}.")
        if not where[0].startswith(f"{self._package}."):
            self._discover()  # what the package itself has comes first
        if self._origins.get(name, where) != where:
            raise ConfigError(f"a {self.kind} {name!r} is registered already: {'.'.join(self._origins[name])}.")

    def register(self, *names: str) -> Callable[[Registered], Registered]:
        """Decorator that enters what it decorates under each of ``names`` and returns it.

        Raises:
            ConfigError: there is no name, or something else has one of them.
        """
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f'give the {self.kind} a name: @register("my_{self.kind.split()[-1]}").')

        def enter(thing: Any) -> Any:
            for name in names:
                self._check_free(name, _origin(thing))
            for name in names:
                self.add(name, thing)
            return thing

        return enter

    def find(self, name: Any) -> Entry:
        """The entry of that name.

        Raises:
            MoejaxError: there is none (or the error that the table was made with); the message lists all names.
        """
        self._discover()
        if name not in self._entries:
            raise self._error(f"{self.kind} {name!r} is unknown; choose from {', '.join(self)}.")
        return self._entries[name]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context after which the table is as it was before, for entries that are made on trial."""
        self._discover()
        entries, origins = dict(self._entries), dict(self._origins)
        try:
            yield
        finally:
            self._entries, self._origins = entries, origins

    def __getitem__(self, name: str) -> Entry:
        self._discover()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(self._entries)

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self)})"

    def _discover(self) -> None:
        """Import the modules of the package once."""
        if self._discovered:
            return
        # set first: the modules themselves may read the table
        self._discovered = True
        package = importlib.import_module(str(self._package))
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{package.__name__}.{module.name}")


def _origin(thing: Any) -> tuple[str, str]:
    """Module and name of a class or function; for a ``functools.partial``, the inner function's."""
    thing = getattr(thing, "func", thing)
    thing = thing if hasattr(thing, "__qualname__") else type(thing)
    return thing.__module__, thing.__qualname__
