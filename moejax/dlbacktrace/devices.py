"""Devices by the names that torch has for them."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from moejax.errors import MoejaxError
from moejax.lm import LM


def pick(name: Any) -> jax.Device | None:
    """``"cpu"``, ``"gpu"`` or ``"cuda"``, perhaps with an index as in ``"cuda:1"``; ``None`` stays.

    Without such a device JAX's default is used, with a warning.

    Raises:
        MoejaxError: another name, or an index beyond the devices that there are.
    """
    if name is None or isinstance(name, jax.Device):
        return name
    platform, _, index = str(name).partition(":")
    platform = "gpu" if platform == "cuda" else platform
    if platform not in ("cpu", "gpu", "tpu") or not (index or "0").isdecimal():
        raise MoejaxError(f"device={str(name)!r} is unknown: 'cpu', 'cuda', 'gpu' or 'tpu', perhaps with ':1'.")
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        default = jax.devices()[0]
        warnings.warn(
            f"device={str(name)!r}: JAX sees none and uses {default.platform}; a GPU needs jax[cuda12] or jax[cuda13].",
            stacklevel=4,
        )
        return default
    if int(index or 0) >= len(devices):
        raise MoejaxError(f"device={str(name)!r}: there are {len(devices)}, counted from 0.")
    return devices[int(index or 0)]


def moved(lm: LM, device: jax.Device | None) -> LM:
    """The model with its weights on that device; as it is if they are there, or laid over several."""
    leaves = jax.tree.leaves(lm.decoder)
    placed = leaves[0].devices()
    if device is None or placed == {device} or len(placed) > 1:
        return lm
    return replace(lm, decoder=jax.device_put(lm.decoder, device))


def default(device: jax.Device | None) -> AbstractContextManager:
    """Inside, new arrays are made on that device."""
    return nullcontext() if device is None else jax.default_device(device)


def name(device: jax.Device | None, lm: LM) -> str:
    """A device's name as torch has it; without one, that of the model's first."""
    found = device or min(jax.tree.leaves(lm.decoder)[0].devices(), key=lambda d: d.id)
    platform = "cuda" if found.platform == "gpu" else found.platform
    return f"{platform}:{found.id}" if found.id else platform
