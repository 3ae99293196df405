"""Summing over a data set: on the device from batch to batch, on the host in double precision now and then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moejax.study.data import Batch, Windows

Tree = TypeVar("Tree")

_FLUSH = 256
"""Batches that are summed in float32 and int32 before the host takes their sums."""

_add = jax.jit(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b))


def accumulate(measure: Callable[[Batch], Tree], windows: Windows, what: str = "", progress: bool = False) -> Tree:
    """The sum of ``measure(batch)`` over all batches, leaf by leaf, as numpy float64 and int64."""
    total: Any = None
    on_device: Any = None
    waiting = 0
    with _bar(progress, what, len(windows)) as advance:
        for batch in windows:
            found, before = measure(batch), on_device
            on_device = found if before is None else _add(before, found)
            # one batch ahead of the device and no more: its inputs and outputs are in memory
            jax.block_until_ready(before)
            waiting += 1
            if waiting == _FLUSH:
                total, on_device, waiting = _flushed(total, on_device), None, 0
            advance()
        return total if on_device is None else _flushed(total, on_device)


def mean(total: Any, count: Any) -> float | None:
    """``total / count``; ``None`` of nothing, and where the total is not finite."""
    return float(total / count) if count and np.isfinite(total) else None


def _flushed(total: Any, on_device: Any) -> Any:
    wide = jax.tree.map(
        lambda x: np.asarray(x).astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64), on_device
    )
    return wide if total is None else jax.tree.map(np.add, total, wide)


@contextmanager
def _bar(shown: bool, what: str, batches: int) -> Iterator[Callable[[], None]]:
    """A bar of batches on stderr, where it can move."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=batches)
        yield lambda: progress.advance(task)
