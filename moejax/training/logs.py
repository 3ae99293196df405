"""Metrics of a run on disk: lines of JSON and TensorBoard event files."""

import json
from pathlib import Path
from typing import Any, Self


class MetricsLog:
    """Writer of ``metrics.jsonl`` and ``tensorboard/`` in the folder of a run; a context manager.

    Args:
        folder: folder of the run, which must exist.
        from_step: last step that was done before. Rows of later steps, which a killed run wrote after its last saved
            state, are removed, because the resumed run does these steps again.
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        # imported here: nothing else in moejax needs it
        from tensorboardX import SummaryWriter

        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= from_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._lines = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of metrics.

        Args:
            row: numbers by name, ``step`` among them, and lists with one number for each mixture layer.
        """
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if isinstance(value, list):
                for layer, one in enumerate(value):
                    self._events.add_scalar(f"{name}/{layer}", one, row["step"])
            elif name != "step":
                self._events.add_scalar(name, value, row["step"])
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._events.close()


def _step(line: str) -> int:
    """Return the step of a line, or a number above all steps for a line that cannot be read."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line: the run was killed while it wrote
