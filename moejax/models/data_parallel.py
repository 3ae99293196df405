"""Independent work over several devices: each device of the mesh axis ``data`` computes a part of it.

Sequences of a batch, targets of an explanation and interventions do not depend on each other. Each device runs the
program of a single device for fewer of them, and waits for no other device. Where the mesh has further axes, the
devices agree on whether a loop goes on (:func:`max_over_devices`). On GPUs, as always within ``shard_map``, XLA's own
kernels replace some small kernels.

The arguments of such a program stand in a dataclass whose fields say along which axis they are split
(:func:`placed`); :func:`placements` reads them.
"""

import math
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from moejax.errors import MoejaxError
from moejax.models.config import Config
from moejax.rules import Gates

DATA = "data"
"""Name of the mesh axis over which independent work is split."""

Placement = Any
"""A ``PartitionSpec`` in the place of an array or of a tree of arrays."""

REPLICATED: Placement = PartitionSpec()
"""Placement of arrays that every device has in full."""

Result = TypeVar("Result")
Tree = TypeVar("Tree")


def split(axis: int) -> Placement:
    """Return the placement of arrays that are split along an axis."""
    return PartitionSpec(*[None] * axis, DATA)


def placed(**axes: int | Callable[[Any], Placement]) -> Any:
    """A field of a dataclass with its placement as metadata.

    Args:
        axes: what devices may split, with the axis that counts it in the field's arrays, as in
            ``placed(sequences=0, seeds=2)``. A function in place of the axis returns the placement of the field's
            value. Where devices split something that is not named, each has the field in full.
    """
    return field(metadata={"placed": axes})


def placements(tree: Tree | type[Tree], over: str) -> Tree:
    """Return the placements of a dataclass's fields (:func:`placed`), in an instance of it.

    Args:
        tree: an instance, or its class if no field's placement depends on its value.
        over: what the devices split, such as ``"sequences"``.
    """
    cls: Any = tree if isinstance(tree, type) else type(tree)
    specs = {}
    for f in fields(cls):
        axis = f.metadata["placed"].get(over)
        specs[f.name] = (
            REPLICATED if axis is None else split(axis) if isinstance(axis, int) else axis(getattr(tree, f.name))
        )
    return cls(**specs)


def gate_specs(gates: Gates) -> Placement:
    """Return the placements of gates where devices split sequences: some gates differ by sequence."""
    return jax.tree.map(lambda gate: split(1) if gate.shape[1] > 1 else REPLICATED, gates)


def batch_mesh(config: Config) -> Mesh | None:
    """Return the mesh whose devices may split the sequences of a batch, or ``None`` if a layer couples sequences."""
    return None if config.couples_sequences else config.mesh


def num_shards(mesh: Mesh | None) -> int:
    """Return how many devices split the work: 1 where the caller has mapped over them already."""
    if mesh is None or DATA in jax.sharding.get_abstract_mesh().manual_axes:
        return 1
    return dict(mesh.shape).get(DATA, 1)


def max_over_devices(number: Int[Array, ""]) -> Int[Array, ""]:
    """Return the largest ``number`` of the devices that are mapped over, if XLA splits work over further mesh axes.

    Without further axes it returns ``number``. Loops need it for their condition. One of XLA's exchanges may join
    groups of devices that share nothing, since a permutation names the pairs of all groups; devices would wait there
    for ever for a group that has left the loop. In the branches of a conditional XLA only exchanges within groups, as
    far as we have seen; a test watches over that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    remaining = math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return jax.lax.pmax(number, mesh.manual_axes) if mesh.manual_axes and remaining > 1 else number


def shard_map_data(
    run: Callable[..., Result], mesh: Mesh | None, arguments: tuple, inputs: tuple, outputs: Placement
) -> Result:
    """Compute ``run(*arguments)``, each device its part.

    If the number of items is no multiple of the number of devices, the last item is computed again and left out.

    Args:
        run: computes each item independently of the others.
        inputs: for each argument a placement (:data:`REPLICATED` or :func:`split`) or a tree of placements, of any
            depth. All split axes have one length; an axis of length 1 is not split but given to every device.
        outputs: the same for the result of ``run``; the lengths of its axes may be multiples of that length.

    Raises:
        MoejaxError: split axes have different lengths.
    """
    if (devices := num_shards(mesh)) == 1:
        return run(*arguments)
    by_leaf = jax.tree.broadcast(inputs, arguments)
    leaves = zip(jax.tree.leaves(arguments), jax.tree.leaves(by_leaf), strict=True)
    lengths = {leaf.shape[len(spec) - 1] for leaf, spec in leaves if spec != REPLICATED}
    count = max(lengths)
    if lengths - {1, count}:
        raise MoejaxError(
            f"axes that devices split have lengths {', '.join(map(str, sorted(lengths)))}: give one length, or 1."
        )

    def unsplit_ones(leaf, spec):
        return REPLICATED if spec != REPLICATED and leaf.shape[len(spec) - 1] < count else spec

    by_leaf = jax.tree.map(unsplit_ones, arguments, by_leaf)
    filled = -(-count // devices) * devices
    numbers = jnp.minimum(jnp.arange(filled), count - 1)

    def fill(leaf: Array, spec: PartitionSpec) -> Array:
        return leaf if spec == REPLICATED or filled == count else jnp.take(leaf, numbers, axis=len(spec) - 1)

    def cut(leaf: Array, spec: PartitionSpec) -> Array:
        if spec == REPLICATED or filled == count:
            return leaf
        axis = len(spec) - 1
        return jax.lax.slice_in_dim(leaf, 0, leaf.shape[axis] // filled * count, axis=axis)

    each = jax.shard_map(run, mesh=mesh, in_specs=by_leaf, out_specs=outputs, axis_names={DATA}, check_vma=False)
    out = each(*jax.tree.map(fill, arguments, by_leaf))
    return jax.tree.map(cut, out, jax.tree.broadcast(outputs, out))
