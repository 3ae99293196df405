"""Examine this machine, and whether a model fits it, for ``moejax doctor``."""

import contextlib
import importlib.metadata
import os
import platform
from typing import Any, cast

import jax

from moejax._version import __version__
from moejax.checkpoints.convert import parse_dtype
from moejax.checkpoints.describe import ModelConfig, architecture
from moejax.checkpoints.load import pack
from moejax.checkpoints.memory import estimate
from moejax.errors import ConfigError
from moejax.ops.packed import FORMATS
from moejax.report.schema import SCHEMA, DoctorReport

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "safetensors", "torch", "transformers")
_DTYPES = ("float32", "bfloat16")


def examine(model: Any = None, *, dtype: Any = None) -> DoctorReport:
    """Collect versions, devices and, if a model is given, how much memory it takes. No weights are read.

    Args:
        model: a loaded model, a folder, a bundled name or a hub id.
        dtype: the dtype of the weights; by default memory is given for float32 and for bfloat16.

    Returns:
        A dictionary that can be written as JSON.

    Raises:
        ConfigError: the model's configuration is not supported.
        CheckpointError: there is no such model.
    """
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "versions": {"moejax": __version__} | {name: _version(name) for name in _PACKAGES},
        "devices": [_device(device) for device in jax.local_devices()],
    }
    if model is not None:
        config = architecture(model)
        dtypes = _DTYPES if dtype is None else (parse_dtype(dtype).name,)
        memory = [estimate(config, parse_dtype(name)).to_dict() for name in dtypes]
        for packed in () if config.is_packed else FORMATS:
            with contextlib.suppress(ConfigError):  # the model has no experts that can be held so
                memory.append(estimate(pack(config, packed), parse_dtype(dtypes[-1])).to_dict())
        facts |= {"model": str(model), "config": ModelConfig.of(config).to_dict(), "memory": memory}
    return cast(DoctorReport, facts)


def _version(package: str) -> str | None:
    """Return the version of an installed package; ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: jax.Device) -> dict[str, Any]:
    """Return a device and its memory in bytes; for a CPU device, the machine's memory."""
    stats = device.memory_stats() or {}
    total, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
    if total is None and device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        used = total - os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return {"id": device.id, "kind": device.device_kind, "platform": device.platform, "bytes": total, "used": used}
