"""In which dtype weights are held: what may be asked for, and what a CPU is given by default."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moejax.checkpoints.folder import ModelFolder
from moejax.checkpoints.readers import HuggingFaceReader, OrbaxReader
from moejax.errors import ConfigError

WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that weights may have."""

_MARGIN = 1.25
"""Memory that must be free for each byte of weights, so that there is room for a pass too."""


def check_dtype(dtype: DTypeLike | None) -> None:
    """Raise ``ConfigError`` if weights cannot be held in a dtype; ``None`` is any."""
    if dtype is None:
        return
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in WEIGHT_DTYPES:
        raise ConfigError(f"dtype {name!r} is none for weights; choose from {', '.join(WEIGHT_DTYPES)}.")


def widening(
    folder: ModelFolder, dtype: DTypeLike | None, mesh: Mesh | None, keep_packed: bool
) -> tuple[DTypeLike | None, Mapping[str, np.dtype]]:
    """Choose the dtype of weights for which the caller named none.

    On CPUs it is float32, which they compute in anyway, if the weights then fit in free memory. If not, the
    checkpoint's dtype is kept, with a warning.

    Returns:
        The dtype to load in, and the dtype that the files have for each leaf and tensor that is widened, by path or
        key.

    Raises:
        ConfigError, CheckpointError: as :func:`moejax.load`.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if dtype is not None or device.platform != "cpu":
        return dtype, {}
    reader = (OrbaxReader if folder.is_orbax else HuggingFaceReader)(folder)
    leaves = {path: entry for path, entry in reader.leaves.items() if jnp.issubdtype(entry.dtype, jnp.floating)}
    narrow = {path: entry.dtype for path, entry in leaves.items() if entry.dtype.itemsize < 4}
    if not narrow or keep_packed:
        return None, {}
    needed = sum(4 * entry.nbytes // entry.dtype.itemsize for entry in leaves.values())
    free = free_memory()
    if free is not None and needed * _MARGIN > free:
        warnings.warn(
            f"float32 weights would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free; the checkpoint's "
            "dtype is kept, whose rounding shows in ledgers. dtype='float32' insists.",
            stacklevel=3,
        )
        return None, {}
    return "float32", narrow | dict(reader.dtypes)


def free_memory() -> int | None:
    """Return the bytes of main memory that are free for programs; ``None`` if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
