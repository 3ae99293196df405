"""What a program that is being traced will run on, as far as that is known."""

from importlib.util import find_spec

import jax
from jax.sharding import Mesh

AXIS = "expert"
"""The mesh axis over which experts are split."""


def target(mesh: Mesh | None = None) -> jax.Device:
    """A device of the mesh, if there is one; else the one that ``jax.default_device`` names, or JAX's first."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    named = getattr(jax.config, "jax_default_device", None)
    if isinstance(named, str):
        return jax.devices(named)[0]
    return jax.devices()[0] if named is None else named


def generation(device: object) -> int:
    """Of an NVIDIA GPU the first number of its compute capability: 8 for Ampere, 9 for Hopper. 0 for what is none."""
    first, dot, _ = str(getattr(device, "compute_capability", "")).partition(".")
    return int(first) if dot and first.isdecimal() else 0


def whole(mesh: Mesh | None) -> bool:
    """Whether experts alone are left to split: what XLA splits by other axes it cannot split inside of a kernel."""
    if mesh is None:
        return True
    split = {AXIS, *jax.sharding.get_abstract_mesh().manual_axes}
    return all(size == 1 for axis, size in mesh.shape.items() if axis not in split)


def takes_triton(mesh: Mesh | None = None) -> bool:
    """Whether the program may have kernels that JAX lowers by Triton: for NVIDIA GPUs of compute capability 8 or later.

    JAX has announced that it will drop that lowering, and says so whenever it is used.
    """
    there = find_spec("jax.experimental.pallas.triton") is not None
    return there and whole(mesh) and generation(target(mesh)) >= 8


def in_shard_map() -> bool:
    """Whether an axis of a mesh is manual here; a kernel does not say whether its results vary along it."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
