"""The progress bar of a long run over a checkpoint, and the summary at its end."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@dataclass(frozen=True)
class Conversion:
    """The summary of a conversion or an export.

    Attributes:
        destination: the folder that was written.
        bytes: the number of bytes that this run read from the source.
        seconds: the time that it took.
        peak_bytes: the most host memory that the process has held at any time, in bytes.
        parts: the number of parts of the model.
        resumed: the number of parts that an earlier run had already written.
        already: whether an earlier run had finished it, so that nothing was done.
    """

    destination: Path
    bytes: int
    seconds: float
    peak_bytes: int
    parts: int
    resumed: int
    already: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that can be written as JSON."""
        return asdict(self) | {"destination": str(self.destination)}

    def __str__(self) -> str:
        if self.already:
            return f"{self.destination}: already written, from the same source with the same options; nothing was done"
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        resumed = f" ({self.resumed} of {self.parts} parts were there already)" if self.resumed else ""
        return (
            f"{self.destination}: {self.bytes:,} bytes in {self.seconds:.1f} s, {rate:.0f} MB/s, "
            f"peak host memory {self.peak_bytes / 2**20:.0f} MiB{resumed}"
        )


def peak_bytes() -> int:
    """Return the most host memory that this process has held at any time, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # on Linux, getrusage counts the memory before exec too, when the process was a copy of its parent
        lines = (line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return next((int(kibibytes) * 1024 for _, kibibytes, _ in lines), 0)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def progress_bar(shown: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, and yield a function that advances it by a number of bytes.

    No bar is shown where it could not move: in a log file, or in a notebook without ipywidgets.

    Args:
        shown: show the bar if it can move.
        what: the text before the bar.
        total: the number of bytes at which the bar is full.
    """
    console = Console(stderr=True)
    moves = console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not (shown and moves)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
