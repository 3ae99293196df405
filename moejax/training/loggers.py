"""Services to which a run's metrics are also sent, where they are installed: Weights & Biases."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.errors import ConfigError

LOGGERS = ("wandb",)
"""What a run may be told to log to, beside its folder."""


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


def wandb_run(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The run of Weights & Biases that belongs to the folder; a resumed run goes on in the same one."""
    named = folder / "wandb_id.txt"
    if not named.exists():
        named.write_text(uuid.uuid4().hex)
    number, name = named.read_text().strip(), folder.resolve().name
    where = {"project": "moejax", "name": name, "dir": str(folder)}
    return _wandb().init(**where, id=number, resume="allow", config=dict(settings))
