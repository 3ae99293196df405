"""Which device a program that is being traced will run on, as far as that is known, and which kernels it can have."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh

AXIS = "expert"
"""The mesh axis over which experts are split."""


_assumed: ContextVar[Any] = ContextVar("assumed device", default=None)


@contextmanager
def assumed_gpu(capability: str) -> Iterator[None]:
    """A context in which :func:`target` is a GPU of a compute capability ("8.0"), for estimates on other machines.

    Programs must not be traced in it: they would be made for that GPU.
    """
    token = _assumed.set(SimpleNamespace(platform="gpu", compute_capability=capability))
    try:
        yield
    finally:
        _assumed.reset(token)


def target(mesh: Mesh | None = None) -> Any:
    """A device of the mesh; without a mesh, the device that ``jax.default_device`` names, or JAX's first device.

    Within :func:`assumed_gpu`, what stands for the GPU.
    """
    if (assumed := _assumed.get()) is not None:
        return assumed
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    named = getattr(jax.config, "jax_default_device", None)
    if isinstance(named, str):
        return jax.devices(named)[0]
    return jax.devices()[0] if named is None else named


def compute_capability(device: object) -> int:
    """Major compute capability of an NVIDIA GPU (8 Ampere, 9 Hopper); 0 for other devices."""
    major, dot, _ = str(getattr(device, "compute_capability", "")).partition(".")
    return int(major) if dot and major.isdecimal() else 0


def only_experts_split(mesh: Mesh | None) -> bool:
    """Return whether XLA splits arrays over no axis of the mesh but the experts'.

    If it does split them over another axis, a kernel would need the arrays of all devices, because XLA cannot split
    them inside of a kernel. Axes that are manual here (``shard_map``) are split already.
    """
    if mesh is None:
        return True
    split = {AXIS, *jax.sharding.get_abstract_mesh().manual_axes}
    return all(size == 1 for axis, size in mesh.shape.items() if axis not in split)


def takes_triton(mesh: Mesh | None = None) -> bool:
    """Return whether the program may have kernels that JAX lowers by Triton.

    These are for NVIDIA GPUs of compute capability 8.0 or later. JAX has announced that it will drop this lowering, and
    warns whenever it is used.
    """
    available = find_spec("jax.experimental.pallas.triton") is not None
    return available and only_experts_split(mesh) and compute_capability(target(mesh)) >= 8


def in_shard_map() -> bool:
    """Return whether an axis of a mesh is manual here. A kernel does not declare whether its results vary along it."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
