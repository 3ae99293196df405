"""What a long run over a checkpoint shows while it goes on, and says at its end."""

import importlib.util
import resource
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
    """What a conversion or an export did.

    Attributes:
        destination: the folder that was written.
        bytes: read from the source by this run.
        seconds: that it took.
        peak_bytes: the most host memory that the process held at any time of its life.
        parts: of the model, and
        resumed: those that an earlier run had already written.
    """

    destination: Path
    bytes: int
    seconds: float
    peak_bytes: int
    parts: int
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"destination": str(self.destination)}

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        resumed = f" ({self.resumed} of {self.parts} parts were there already)" if self.resumed else ""
        return (
            f"{self.destination}: {self.bytes:,} bytes in {self.seconds:.1f} s, {rate:.0f} MB/s, "
            f"peak host memory {self.peak_bytes / 2**20:.0f} MiB{resumed}"
        )


def peak_bytes() -> int:
    """The most host memory that this process held at any time."""
    status = Path("/proc/self/status")
    if status.exists():
        # what getrusage gives on Linux counts what the process was before exec, that is, its parent
        lines = (line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return next((int(kibibytes) * 1024 for _, kibibytes, _ in lines), 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def progress_bar(shown: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of ``total`` bytes on stderr; what it yields is called with the bytes that are done.

    There is none where it could not move: in a log file, or in a notebook without ipywidgets.
    """
    console = Console(stderr=True)
    moves = console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not (shown and moves)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
