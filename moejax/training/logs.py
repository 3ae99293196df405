"""Metrics of a run: lines of JSON and TensorBoard event files on disk, and a logger if one is asked for."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from moejax.checkpoints.files import inside
from moejax.training.loggers import check_logger, wandb_run
from moejax.writing import naming, write_file

METRICS = "metrics.jsonl"
"""The name of the file with a line of JSON for each row."""


class MetricsLog:
    """Writer of ``metrics.jsonl`` and ``tensorboard/`` in the folder of a run; a context manager.

    A row is either in ``metrics.jsonl`` as a complete line, or not at all, also where the disk is full.

    Args:
        folder: folder of the run, which must exist.
        from_step: last step that was done before. Rows of later steps, which a killed run wrote after its last saved
            state, are removed, because the resumed run does these steps again.
        logger: a name in :data:`moejax.training.loggers.LOGGERS`, to which rows are also sent.
        settings: settings of the run, which the logger is told.

    Raises:
        ConfigError: an unknown logger, or one whose package is not installed.
        CheckpointError: ``metrics.jsonl`` is not a regular file, or is a link that leaves the folder.
        OSError: a file cannot be written; what it had is still there.
    """

    def __init__(
        self, folder: Path, from_step: int = 0, logger: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        check_logger(logger)
        inside(folder, METRICS)
        self._path = folder / METRICS
        _repair(self._path, from_step)
        self._lines = self._path.open("ab", buffering=0)
        try:
            self._events = _Events(folder / "tensorboard", from_step + 1)
            self._wandb = wandb_run(folder, settings or {}) if logger == "wandb" else None
        except BaseException:
            self._lines.close()
            raise

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of metrics.

        Args:
            row: numbers by name, ``step`` among them, and lists with one number for each mixture layer.

        Raises:
            OSError: it cannot be written, and is left out.
        """
        with naming(self._path):
            self._append(json.dumps(row).encode() + b"\n")
        numbers = dict(_numbers(row))
        for name, value in numbers.items():
            self._events.add(name, value, row["step"])
        self._events.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._lines.fileno()).st_size
        try:
            while line:
                line = line[self._lines.write(line) :]
        except BaseException:
            self._lines.truncate(size)  # which needs no room
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.close()
        # after a full disk, the first error is the one to show
        with contextlib.suppress(*([OSError] if kind else [])):
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each number of a row but its step; those of mixture layers by name and number of the mixture."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}/{layer}", one) for layer, one in enumerate(value))
        elif name != "step":
            yield name, value


class _Events:
    """Writer of TensorBoard's event files.

    tensorboardX's own writes from a thread, whose errors nobody sees.

    Args:
        folder: folder of the files.
        purge_step: step from which on TensorBoard shall forget what earlier files of the folder say.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # imported here: nothing else in moejax needs it
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2  # whose classes are made when it is imported
        self._scalar, self._event, self._folder = summary.scalar, proto.Event, folder
        folder.mkdir(exist_ok=True)
        # the library names files by the second, so a run that is resumed within one would overwrite a file
        taken = {path.name.rpartition(".")[2] for path in folder.iterdir()}
        number = next(str(n) for n in itertools.count() if str(n) not in taken)
        with naming(folder):
            self._writer: Any = EventsWriter(str(folder / "events"), f".{number}")
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._writer.write_event(proto.Event(step=purge_step, session_log=start))

    def add(self, name: str, value: float, step: int) -> None:
        """Write a number."""
        with naming(self._folder):
            self._writer.write_event(self._event(summary=self._scalar(name, value), step=step, wall_time=time.time()))

    def flush(self) -> None:
        """Bring what was written to disk."""
        with naming(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """End the file."""
        with naming(self._folder):
            try:
                self._writer.flush()
            finally:
                with contextlib.suppress(OSError):
                    self._writer.close()


def _repair(path: Path, from_step: int) -> None:
    """Keep of each step up to ``from_step`` the last complete line, in the order of steps.

    The file is replaced as a whole, and only if there is something to mend.
    """
    before = path.read_bytes() if path.exists() else b""
    rows = {_step(line): line for line in before.splitlines()}
    after = b"".join(rows[step] + b"\n" for step in sorted(rows) if step <= from_step)
    if after != before:
        write_file(path, after)


def _step(line: bytes) -> int:
    """Return the step of a line, or a number above all steps for a line that cannot be read."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line: the run was killed while it wrote
