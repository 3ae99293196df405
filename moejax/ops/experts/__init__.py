"""Grouped expert matmul: every routed slot of a token is multiplied by the matrix of its expert."""

from moejax.ops.experts.assignment import Assignment, assign
from moejax.ops.experts.matmul import expert_matmul

__all__ = ["Assignment", "assign", "expert_matmul"]
