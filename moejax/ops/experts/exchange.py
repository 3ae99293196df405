"""Experts on several devices: each multiplies the slots of its own, and the results are exchanged.

Matrices never travel. Every device is given all tokens, which are small beside the matrices, and sends what it
computed; a slot is zero on all devices but its expert's, so that their sum is exact.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax.ops.experts.assignment import Assignment
from moejax.ops.mxfp4 import MXFP4

AXIS = "expert"
"""The mesh axis over which experts are split."""


def over_devices(
    run: Callable[..., Array],
    rows: tuple[Array, ...],
    assignment: Assignment,
    weight: Array | MXFP4,
    *,
    split: bool = False,
) -> Array:
    """``run(*rows, weight, assignment)`` with each device's experts, summed over devices, or ``split`` as experts are.

    Other axes of the mesh are left to XLA.
    """
    mesh = assignment.mesh
    assert mesh is not None, "called for experts that are split"
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    devices, experts = mesh.shape[AXIS], assignment.load.shape[0]
    first = jnp.arange(devices, dtype=jnp.int32) * (experts // devices)

    def on_one(rows: tuple[Array, ...], weight: Array | MXFP4, slots: Assignment, first: Array) -> Array:
        ids = slots.ids - first
        mine = (ids >= 0) & (ids < slots.load.shape[0])
        rank = jnp.where(mine, slots.rank, -1)
        own = Assignment(jnp.where(mine, ids, 0), rank, slots.load, complete=False)
        result = run(*rows, weight, own)
        return result if split else _sum(result, on_cpu)

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    slots = replace(assignment, mesh=None)
    places = replace(slots, ids=everywhere, rank=everywhere, load=own)
    exchanged = jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(everywhere, own, places, own),
        out_specs=own if split else everywhere,
        axis_names={AXIS},
        check_vma=False,
    )
    return exchanged(rows, weight, slots, first)


def _sum(x: Array, on_cpu: bool) -> Array:
    # XLA's CPU compiler aborts at a sum of bfloat16 over devices (AllReducePromotion, jaxlib 0.10)
    narrow = on_cpu and x.dtype == jnp.bfloat16
    return jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype) if narrow else jax.lax.psum(x, AXIS)
