"""Grouped expert matmul: every routed slot of a token is multiplied by the matrix of its expert."""

from moejax.ops.experts.assignment import Assignment, assign
from moejax.ops.experts.expert_parallel import SumOverDevices, expert_parallel
from moejax.ops.experts.matmul import grouped_matmul
from moejax.ops.experts.rows import permute, unpermute

__all__ = [
    "Assignment",
    "SumOverDevices",
    "assign",
    "expert_parallel",
    "grouped_matmul",
    "permute",
    "unpermute",
]
