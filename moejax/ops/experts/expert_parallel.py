"""Expert parallelism: each device multiplies with its own experts, and the results are summed over devices.

Weights never leave their device. Every device gets all tokens, which are small compared with the weights. A slot is
zero on all devices but the one that has its expert, so that the sum over devices (``psum``) completes it. Callers
exchange either the slots or, with fewer bytes, their weighted sums over a token's slots.

The computation is passed in as a function, ``run``, and :func:`expert_parallel` calls it (inversion of control). The
reason is that the same code must run in two surroundings: on one device it is called directly with all experts, on
several it is called inside of ``jax.shard_map`` with the experts and slots of one device, and only this module knows
which. For the same reason ``run`` gets the sum over devices as an argument: it alone knows at which point of the
computation the sum costs least, and on one device the sum is the identity.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax.ops.device import AXIS
from moejax.ops.experts.dispatch.assignment import Assignment, assign

Psum = Callable[[Array], Array]
"""A function that sums an array over devices; the identity on one device."""


def expert_parallel(run: Callable[..., Array], experts: Any, assignment: Assignment, *shared: Any) -> Array:
    """``run(experts, assignment, psum, *shared)``, on each device with its own experts if they are split over devices.

    Mesh axes other than the experts' are left to XLA. Differentiable in ``experts`` and ``shared``.

    Args:
        run: computes with some of the experts and an assignment in which the slots of all other experts are unassigned.
            Everything it returns must have passed through ``psum``.
        experts: a pytree of arrays whose first axis is the expert.
        assignment: the slots of all experts; its ``mesh`` says whether experts are split.
        shared: pytrees that every device gets in full.
    """
    mesh = assignment.mesh
    if mesh is None or AXIS not in mesh.axis_names:
        return run(experts, assignment, lambda x: x, *shared)
    devices, num_experts = mesh.shape[AXIS], len(assignment.group_sizes)
    psum = partial(_psum, mesh.devices.flat[0].platform == "cpu", devices)
    first_experts = jnp.arange(devices, dtype=jnp.int32) * (num_experts // devices)

    def on_one_device(experts: Any, first_expert: Array, slots: Assignment, shared: tuple) -> Array:
        num_local = num_experts // devices
        ids = slots.ids - first_expert
        local = (ids >= 0) & (ids < num_local) & (slots.rank_in_expert >= 0)
        local_slots = assign(
            jnp.where(local, ids, num_local),
            num_local,
            allow_unassigned=True,
            by_expert=slots.by_expert,
            mesh=slots.mesh,
        )
        return run(experts, local_slots, psum, *shared)

    split, replicated = PartitionSpec(AXIS), PartitionSpec()
    surrounding_mesh = jax.sharding.get_abstract_mesh()
    sharded = jax.shard_map(
        on_one_device,
        # inside of a map over another axis, the mesh must be the one of that map
        mesh=surrounding_mesh if surrounding_mesh.manual_axes else mesh,
        in_specs=(split, split, replicated, replicated),
        out_specs=replicated,
        axis_names={AXIS},
        check_vma=False,
    )
    return sharded(experts, first_experts, assignment, shared)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _psum(on_cpu: bool, devices: int, x: Array) -> Array:
    # XLA's CPU compiler aborts at a bfloat16 sum over devices (AllReducePromotion, jaxlib 0.10)
    promote = on_cpu and x.dtype == jnp.bfloat16
    return jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype) if promote else jax.lax.psum(x, AXIS)


def _forward(on_cpu, devices, x):
    return _psum(on_cpu, devices, x), None


def _backward(on_cpu, devices, _, cotangent):
    # shard_map gives each device an equal part of the cotangent of a replicated result; each device needs all of it
    return (cotangent * devices,)


_psum.defvjp(_forward, _backward)
