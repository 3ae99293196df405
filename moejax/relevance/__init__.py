"""Relevance: targets, ``explain``, and the conservation ledger."""

from moejax.relevance.explain import explain, explain_batch
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, Relevance
from moejax.relevance.targets import Argmax, Continuation, Contrast, Generated, Target, Token

__all__ = [
    "Argmax",
    "Candidate",
    "Continuation",
    "Contrast",
    "Generated",
    "Ledger",
    "Relevance",
    "Target",
    "Token",
    "explain",
    "explain_batch",
]
