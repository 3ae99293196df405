"""Sums over a data set.

Batches are summed on the device in float32 and int32. Every :data:`_FLUSH` batches, the host adds these sums to its own
in float64 and int64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moejax.study.data import WindowBatch, Windows

Tree = TypeVar("Tree")

_FLUSH = 256
"""Number of batches that the device sums before the host takes the sums."""

_add = jax.jit(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b))


def accumulate(
    measure: Callable[[WindowBatch], Tree], windows: Windows, what: str = "", progress: bool = False
) -> Tree:
    """The sum of ``measure(batch)`` over all batches, leaf by leaf, as numpy float64 and int64.

    Args:
        measure: returns a pytree of sums over a batch.
        what: name of the progress bar.
        progress: show a bar on stderr.

    Returns:
        The sums; ``None`` if there is no batch.
    """
    total: Any = None
    on_device: Any = None
    waiting = 0
    with _bar(progress, what, len(windows)) as advance:
        for batch in windows:
            sums, before = measure(batch), on_device
            on_device = sums if before is None else _add(before, sums)
            # at most one batch ahead of the device, because every queued batch holds memory
            jax.block_until_ready(before)
            waiting += 1
            if waiting == _FLUSH:
                total, on_device, waiting = _flushed(total, on_device), None, 0
            advance()
        return total if on_device is None else _flushed(total, on_device)


def mean(total: Any, count: Any) -> float | None:
    """``total / count``; ``None`` if the count is zero or the total is not finite."""
    return float(total / count) if count and np.isfinite(total) else None


def _flushed(total: Any, on_device: Any) -> Any:
    """``total`` plus the device's sums, as numpy float64 and int64."""
    wide = jax.tree.map(
        lambda x: np.asarray(x).astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64), on_device
    )
    return wide if total is None else jax.tree.map(np.add, total, wide)


@contextmanager
def _bar(shown: bool, what: str, batches: int) -> Iterator[Callable[[], None]]:
    """A progress bar over batches on stderr; it is hidden if stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=batches)
        yield lambda: progress.advance(task)
