"""Relevance: targets, ``explain``, and the conservation ledger."""

from moejax.relevance.engine import NODES
from moejax.relevance.explain import explain, explain_batch
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, Relevance
from moejax.relevance.targets import (
    Argmax,
    Continuation,
    Contrast,
    Direction,
    Generated,
    LogProbability,
    MeanContrast,
    RouterChoice,
    Span,
    Target,
    Token,
)

__all__ = [
    "NODES",
    "Argmax",
    "Candidate",
    "Continuation",
    "Contrast",
    "Direction",
    "Generated",
    "Ledger",
    "LogProbability",
    "MeanContrast",
    "Relevance",
    "RouterChoice",
    "Span",
    "Target",
    "Token",
    "explain",
    "explain_batch",
]
