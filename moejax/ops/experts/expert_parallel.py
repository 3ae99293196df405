"""Experts on several devices: each computes what its own contribute, and the sums are exchanged.

Matrices never travel. Every device is given all tokens, which are small beside the matrices; a slot is zero on all
devices but its expert's, and what is exchanged is the sum over devices, of slots or of their sums.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax.ops.device import AXIS
from moejax.ops.experts.assignment import Assignment, assign

SumOverDevices = Callable[[Array], Array]
"""The sum of what the devices found."""


def expert_parallel(run: Callable[..., Array], experts: Any, assignment: Assignment, *shared: Any) -> Array:
    """``run(experts, assignment, total, *shared)``, on every device with its own experts where they are split.

    Other axes of the mesh are left to XLA. Differentiable in ``experts`` and ``shared``.

    Args:
        run: computes with some experts and the slots that are theirs; all that it returns has passed through ``total``.
        experts: a pytree of arrays whose first axis is that of the experts.
        shared: pytrees that every device is given whole.
    """
    mesh = assignment.mesh
    if mesh is None or AXIS not in mesh.axis_names:
        return run(experts, assignment, lambda x: x, *shared)
    devices, count = mesh.shape[AXIS], len(assignment.load)
    total = partial(_total, mesh.devices.flat[0].platform == "cpu", devices)
    first = jnp.arange(devices, dtype=jnp.int32) * (count // devices)

    def on_one(experts: Any, first: Array, slots: Assignment, shared: tuple) -> Array:
        own = count // devices
        ids = slots.ids - first
        mine = (ids >= 0) & (ids < own) & (slots.rank >= 0)
        part = assign(jnp.where(mine, ids, own), own, allow_unassigned=True, by_expert=slots.by_expert, mesh=slots.mesh)
        return run(experts, part, total, *shared)

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    around = jax.sharding.get_abstract_mesh()
    exchanged = jax.shard_map(
        on_one,
        # within a map over another axis it is that one's
        mesh=around if around.manual_axes else mesh,
        in_specs=(own, own, everywhere, everywhere),
        out_specs=everywhere,
        axis_names={AXIS},
        check_vma=False,
    )
    return exchanged(experts, first, assignment, shared)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(on_cpu: bool, devices: int, x: Array) -> Array:
    # XLA's CPU compiler aborts at a sum of bfloat16 over devices (AllReducePromotion, jaxlib 0.10)
    narrow = on_cpu and x.dtype == jnp.bfloat16
    return jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype) if narrow else jax.lax.psum(x, AXIS)


def _forward(on_cpu, devices, x):
    return _total(on_cpu, devices, x), None


def _backward(on_cpu, devices, _, cotangent):
    # a result that all devices have hands each an equal part of its cotangent, of which each needs all
    return (cotangent * devices,)


_total.defvjp(_forward, _backward)
