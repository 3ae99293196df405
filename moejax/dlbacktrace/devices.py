"""Devices by the names that torch gives them."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from moejax.errors import MoejaxError
from moejax.lm import LM


def find_device(name: Any) -> jax.Device | None:
    """The device of a name: ``"cpu"``, ``"gpu"`` or ``"cuda"``, perhaps with an index, as ``"cuda:1"``.

    ``None`` stays ``None``. If JAX has no device of that kind, its default device is used, with a warning.

    Raises:
        MoejaxError: an unknown name, or an index beyond the last device.
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


def move(lm: LM, device: jax.Device | None) -> LM:
    """The model with its weights on ``device``; the same model if they are there already or lie on several devices."""
    leaves = jax.tree.leaves(lm.decoder)
    current = leaves[0].devices()
    if device is None or current == {device} or len(current) > 1:
        return lm
    return replace(lm, decoder=jax.device_put(lm.decoder, device))


def default_device(device: jax.Device | None) -> AbstractContextManager:
    """A context in which new arrays are made on ``device``; ``None`` changes nothing."""
    return nullcontext() if device is None else jax.default_device(device)


def device_name(device: jax.Device | None, lm: LM) -> str:
    """The name that torch gives to ``device``, or to the model's first device if it is ``None``."""
    named = device or min(jax.tree.leaves(lm.decoder)[0].devices(), key=lambda d: d.id)
    platform = "cuda" if named.platform == "gpu" else named.platform
    return f"{platform}:{named.id}" if named.id else platform
