"""What this machine has, and whether a model fits it: what ``moejax doctor`` prints."""

import contextlib
import importlib.metadata
import os
import platform
from typing import Any, cast

import jax

from moejax.checkpoints.convert import parse_dtype
from moejax.checkpoints.describe import ModelConfig, architecture
from moejax.checkpoints.load import pack
from moejax.checkpoints.memory import estimate
from moejax.errors import ConfigError
from moejax.report.schema import SCHEMA, DoctorReport

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "safetensors", "torch", "transformers")
_SHOWN = ("float32", "bfloat16")


def examine(model: Any = None, *, dtype: Any = None) -> DoctorReport:
    """Versions, devices and, given a model, its memory in ``dtype`` or in the usual ones; reads no weights.

    Raises:
        ConfigError: the model's configuration is not supported.
        CheckpointError: there is no such model.
    """
    import moejax  # which imports this room; what runs counts, whatever is installed

    found: dict[str, Any] = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "versions": {"moejax": moejax.__version__} | {name: _version(name) for name in _PACKAGES},
        "devices": [_device(device) for device in jax.local_devices()],
    }
    if model is not None:
        config = architecture(model)
        dtypes = _SHOWN if dtype is None else (parse_dtype(dtype).name,)
        memory = [estimate(config, parse_dtype(name)).to_dict() for name in dtypes]
        with contextlib.suppress(ConfigError):  # where there is nothing that could stay packed
            memory.append(estimate(pack(config), parse_dtype(dtypes[-1])).to_dict())
        found |= {"model": str(model), "config": ModelConfig.of(config).to_dict(), "memory": memory}
    return cast(DoctorReport, found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: jax.Device) -> dict[str, Any]:
    """A device and its memory; a CPU has the machine's."""
    stats = device.memory_stats() or {}
    total, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
    if total is None and device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        used = total - os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return {"id": device.id, "kind": device.device_kind, "platform": device.platform, "bytes": total, "used": used}
