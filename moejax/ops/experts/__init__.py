"""Experts: order the routed slots by expert, multiply each group of rows by its expert's matrix, and read them back.

``dispatch/`` orders slots and copies rows, ``matmul/`` has one file for each implementation of the grouped matmul, and
``expert_parallel`` runs both on several devices.
"""

from moejax.ops.experts.dispatch.assignment import Assignment, assign
from moejax.ops.experts.dispatch.permute import permute, unpermute
from moejax.ops.experts.dispatch.rank_slots import padded_rows
from moejax.ops.experts.expert_parallel import Psum, expert_parallel
from moejax.ops.experts.grouped_map import grouped_map
from moejax.ops.experts.matmul.api import grouped_matmul, register_matmul
from moejax.ops.experts.matmul.hopper import supports_shapes
from moejax.ops.experts.matmul.padded import capacities

__all__ = [
    "Assignment",
    "Psum",
    "assign",
    "capacities",
    "expert_parallel",
    "grouped_map",
    "grouped_matmul",
    "padded_rows",
    "permute",
    "register_matmul",
    "supports_shapes",
    "unpermute",
]
