"""Grouped expert matmul: every routed slot of a token is multiplied by the matrix of its expert."""

from moejax.ops.experts.assignment import Assignment, assign
from moejax.ops.experts.exchange import OverDevices, over_devices
from moejax.ops.experts.matmul import grouped_matmul
from moejax.ops.experts.rows import collect, spread

__all__ = [
    "Assignment",
    "OverDevices",
    "assign",
    "collect",
    "grouped_matmul",
    "over_devices",
    "spread",
]
