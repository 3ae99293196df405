"""What is independent, over several devices: each takes its share.

Sequences of a batch, targets of an explanation and interventions have nothing to do with each other. Each device of
the mesh's axis ``data`` runs, for fewer of them, what one device would run, and waits for no other; where the mesh has
more axes, they agree on whether a loop goes on (:func:`max_over_devices`). (On GPUs some small kernels are XLA's then, as
wherever devices are mapped over.)
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from moejax.errors import MoejaxError
from moejax.models.config import Config
from moejax.rules import Gates

DATA = "data"
"""The mesh axis over which they are shared out."""

Placement = Any
"""A ``PartitionSpec`` in the place of an array or of a tree of them."""

REPLICATED: Placement = PartitionSpec()
"""The placement of what every device is given whole, or finds."""

Found = TypeVar("Found")


def split(axis: int) -> Placement:
    """The placement of what is shared out along an axis."""
    return PartitionSpec(*[None] * axis, DATA)


def gate_specs(gates: Gates) -> Placement:
    """The placement of gates where sequences are shared out; some gates differ by sequence."""
    return jax.tree.map(lambda gate: split(1) if gate.shape[1] > 1 else REPLICATED, gates)


def batch_mesh(config: Config) -> Mesh | None:
    """The mesh among whose devices sequences may be shared out: none if a layer lets those of a batch compete."""
    return None if config.couples_sequences else config.mesh


def num_shards(mesh: Mesh | None) -> int:
    """Devices that take a share; one where the caller has mapped them himself."""
    if mesh is None or DATA in jax.sharding.get_abstract_mesh().manual_axes:
        return 1
    return dict(mesh.shape).get(DATA, 1)


def max_over_devices(number: Int[Array, ""]) -> Int[Array, ""]:
    """The largest over the devices that are mapped over, where XLA splits work over others too; elsewhere ``number``.

    For the steps of a loop: groups of devices that share nothing may meet in one of XLA's exchanges all the same (a
    permutation names the pairs of all groups), and would wait there for ever for one that has left. In branches of
    what is computed XLA was only seen to exchange within groups, which a test holds it to.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return jax.lax.pmax(number, mesh.manual_axes) if mesh.manual_axes and left > 1 else number


def shard_map_data(
    run: Callable[..., Found], mesh: Mesh | None, arguments: tuple, placed: tuple, found: Placement
) -> Found:
    """``run(*arguments)``, each device with its share.

    Where devices do not divide the number, the last one is computed again and left out.

    Args:
        run: computes each of them without regard to the others.
        placed: of each argument a placement (:data:`REPLICATED` or :func:`along`) or a tree of them, of any depth. What is
            shared out has one length, or is one for all, and then every device is given it.
        found: the same of what ``run`` returns, whose lengths may be multiples of that.

    Raises:
        MoejaxError: it has several lengths.
    """
    if (devices := num_shards(mesh)) == 1:
        return run(*arguments)
    by_leaf = jax.tree.broadcast(placed, arguments)
    leaves = zip(jax.tree.leaves(arguments), jax.tree.leaves(by_leaf), strict=True)
    lengths = {leaf.shape[len(spec) - 1] for leaf, spec in leaves if spec != REPLICATED}
    count = max(lengths)
    if lengths - {1, count}:
        raise MoejaxError(f"of what devices share there are {', '.join(map(str, sorted(lengths)))}: one number or 1.")
    whole = lambda leaf, spec: REPLICATED if spec != REPLICATED and leaf.shape[len(spec) - 1] < count else spec
    by_leaf = jax.tree.map(whole, arguments, by_leaf)
    filled = -(-count // devices) * devices
    numbers = jnp.minimum(jnp.arange(filled), count - 1)

    def fill(leaf: Array, spec: PartitionSpec) -> Array:
        return leaf if spec == REPLICATED or filled == count else jnp.take(leaf, numbers, axis=len(spec) - 1)

    def cut(leaf: Array, spec: PartitionSpec) -> Array:
        if spec == REPLICATED or filled == count:
            return leaf
        axis = len(spec) - 1
        return jax.lax.slice_in_dim(leaf, 0, leaf.shape[axis] // filled * count, axis=axis)

    each = jax.shard_map(run, mesh=mesh, in_specs=by_leaf, out_specs=found, axis_names={DATA}, check_vma=False)
    out = each(*jax.tree.map(fill, arguments, by_leaf))
    return jax.tree.map(cut, out, jax.tree.broadcast(found, out))
