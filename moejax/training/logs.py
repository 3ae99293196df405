"""Metrics of a run: lines of JSON and TensorBoard event files on disk, and Weights & Biases if it is asked for."""

import importlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from moejax.errors import ConfigError

LOGGERS = ("wandb",)
"""What a run may be told to log to, beside its folder."""


class MetricsLog:
    """Writer of ``metrics.jsonl`` and ``tensorboard/`` in the folder of a run; a context manager.

    Args:
        folder: folder of the run, which must exist.
        from_step: last step that was done before. Rows of later steps, which a killed run wrote after its last saved
            state, are removed, because the resumed run does these steps again.
        logger: a name in :data:`LOGGERS`, to which rows are also sent.
        settings: settings of the run, which the logger is told.

    Raises:
        ConfigError: an unknown logger, or one whose package is not installed.
    """

    def __init__(
        self, folder: Path, from_step: int = 0, logger: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        # imported here: nothing else in moejax needs it
        from tensorboardX import SummaryWriter

        check_logger(logger)
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= from_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._lines = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)
        self._wandb = _wandb_run(folder, settings or {}) if logger == "wandb" else None

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of metrics.

        Args:
            row: numbers by name, ``step`` among them, and lists with one number for each mixture layer.
        """
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        numbers = dict(_numbers(row))
        for name, value in numbers.items():
            self._events.add_scalar(name, value, row["step"])
        self._events.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def check_logger(logger: str | None) -> None:
    """Check that a run can log there.

    Raises:
        ConfigError: an unknown logger, or one whose package is not installed.
    """
    if logger is not None and logger not in LOGGERS:
        raise ConfigError(f"logger={logger!r} is unknown; choose from {', '.join(LOGGERS)}, or leave it out.")
    if logger == "wandb":
        _wandb()


def _wandb() -> Any:
    try:
        module = importlib.import_module("wandb")
    except ImportError:
        module = None
    # a folder of that name, as wandb itself leaves behind, can be imported too
    if not hasattr(module, "init"):
        raise ConfigError("logger='wandb' needs the package wandb, which is not installed: pip install wandb.")
    return module


def _wandb_run(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The run of Weights & Biases that belongs to the folder; a resumed run goes on in the same one."""
    named = folder / "wandb_id.txt"
    if not named.exists():
        named.write_text(uuid.uuid4().hex)
    number, name = named.read_text().strip(), folder.resolve().name
    where = {"project": "moejax", "name": name, "dir": str(folder)}
    return _wandb().init(**where, id=number, resume="allow", config=dict(settings))


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each number of a row but its step; those of mixture layers by name and number of the mixture."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}/{layer}", one) for layer, one in enumerate(value))
        elif name != "step":
            yield name, value


def _step(line: str) -> int:
    """Return the step of a line, or a number above all steps for a line that cannot be read."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line: the run was killed while it wrote
