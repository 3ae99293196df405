"""Grouped expert matmul: every routed slot of a token is multiplied by the matrix of its expert."""

from moejax.ops.experts.assignment import Assignment, assign, take
from moejax.ops.experts.exchange import Total, over_devices
from moejax.ops.experts.matmul import expert_matmul, grouped_matmul
from moejax.ops.experts.rows import collect, spread

__all__ = [
    "Assignment",
    "Total",
    "assign",
    "collect",
    "expert_matmul",
    "grouped_matmul",
    "over_devices",
    "spread",
    "take",
]
