"""Metrics of a run on disk: lines of JSON, and TensorBoard's event files."""

import json
from pathlib import Path
from typing import Any, Self


class Log:
    """``metrics.jsonl`` and ``tensorboard/`` in a folder; a resumed run goes on after ``from_step``.

    Lines of later steps, which a killed run wrote after its last checkpoint, are removed: those steps come again.
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        # imported here: nothing else needs it
        from tensorboardX import SummaryWriter

        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= from_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._lines = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics under its ``step``; lists have an entry for each mixture."""
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
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line, from a run that was killed while it wrote
