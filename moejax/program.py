"""``jax.jit`` for what runs a whole model, without what makes its programs wait and nobody reads.

JAX attaches to every operation the lines of Python that led to it, up to a hundred frames, a notebook's own among
them. XLA formats all of that anew whenever it loads a program, also from the persistent cache: a third of the time
that loading takes. What an operation belongs to, its name says (``jit(relevance)/jvp(..)``). And Python's collector
goes through the many new objects of a trace, hardly any of which is garbage yet: a fifth of the time for tracing and
lowering.
"""

import gc
import threading
from collections.abc import Callable
from functools import update_wrapper
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

_FRAMES = "jax_traceback_in_locations_limit"


class _FastTracing:
    """A context in which programs are made without frames and collections; many threads may be in it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._frames, self._collects = 0, False

    @property
    def is_entered(self) -> bool:
        """Whether a program is made or runs."""
        return self._inside > 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._frames, self._collects = getattr(jax.config, _FRAMES), gc.isenabled()
                jax.config.update(_FRAMES, 0)
                gc.disable()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                jax.config.update(_FRAMES, self._frames)
                if self._collects:
                    gc.enable()


fast_tracing = _FastTracing()
"""``with fast_tracing: ..`` makes programs of one's own as :class:`Program` does."""


class Program(Generic[P, R]):
    """``jax.jit`` with its options, for a function that runs a whole model."""

    def __init__(self, function: Callable[P, R], **options: Any) -> None:
        self.jitted = jax.jit(function, **options)
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        with fast_tracing:
            return self.jitted(*args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """As a function under ``jax.jit`` has it."""
        with fast_tracing:
            return self.jitted.lower(*args, **kwargs)
