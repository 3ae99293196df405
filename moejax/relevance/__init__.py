"""Relevance: targets, ``explain``, and the conservation ledger."""

from moejax.relevance.ablate import Cell, ablate
from moejax.relevance.baselines import (
    BASELINES,
    Direct,
    Scores,
    activation_norm,
    direct_logit_attribution,
    frequency,
    integrated_gradients,
    reap,
    rollout,
    router_weight,
)
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
    "BASELINES",
    "NODES",
    "Argmax",
    "Candidate",
    "Cell",
    "Continuation",
    "Contrast",
    "Direct",
    "Direction",
    "Generated",
    "Ledger",
    "LogProbability",
    "MeanContrast",
    "Relevance",
    "RouterChoice",
    "Scores",
    "Span",
    "Target",
    "Token",
    "ablate",
    "activation_norm",
    "direct_logit_attribution",
    "explain",
    "explain_batch",
    "frequency",
    "integrated_gradients",
    "reap",
    "rollout",
    "router_weight",
]
