"""A GPU's memory: have JAX use most of it, and ask how much of it is free."""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import jax

FRACTION = 0.95
"""The fraction of a GPU's memory that JAX is told to use; the rest is for the driver and for libraries."""

_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The environment variable that says how much of a GPU JAX uses, and its earlier name; jaxlib refuses both together."""

_DEFAULT = 0.75
"""The fraction that JAX uses where no variable is set."""

_STEPS = 32
"""Free memory is rounded down to a multiple of this part of all memory."""

MARGIN = 0.1
"""The fraction of free memory that an estimate should not count on: compilers and fragments take some."""

_warned: set[str] = set()


def reserve_memory() -> None:
    """Have JAX use 95 % of a GPU's memory, in place of 75 %; a variable that is set already stays as it is.

    This works until JAX has started a backend, as its first computation and ``jax.devices()`` do. If it has started
    on a GPU with the default, a warning says once what would have helped. On other devices nothing happens.
    """
    if any(os.environ.get(name) for name in _VARIABLES):
        return
    if not _has_started():
        os.environ[_VARIABLES[0]] = str(FRACTION)
    elif jax.default_backend() == "gpu" and "late" not in _warned:
        _warned.add("late")
        warnings.warn(
            f"JAX had started before and uses {_DEFAULT:.0%} of the GPU's memory; for {FRACTION:.0%} set "
            f"{_VARIABLES[0]}={FRACTION} before Python starts, or load a model before JAX computes anything.",
            stacklevel=3,
        )


def _has_started() -> bool:
    """Return whether JAX has started a backend; asking for its devices would start one."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def free_bytes(devices: Iterable[Any]) -> int | None:
    """Return how many bytes are free on that device which has the fewest, less a margin.

    The number is rounded down, so that a program that is chosen by it is mostly chosen again. ``None`` where a device
    does not say how much it has, as CPUs do not.
    """
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats or "bytes_in_use" not in stats:
            return None
        step = max(1, stats["bytes_limit"] // _STEPS)
        free.append(int((1 - MARGIN) * (stats["bytes_limit"] - stats["bytes_in_use"])) // step * step)
    return min(free, default=None)
