"""Relevance: targets, ``explain``, ``ablate``, baselines, and the conservation ledger."""

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
    register_baseline,
    rollout,
    router_weight,
)
from moejax.relevance.engine import NODES
from moejax.relevance.explain import explain, explain_batch
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, Relevance
from moejax.relevance.targets import (
    TARGETS,
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
    parse_target,
    register_target,
    target_help,
)

__all__ = [
    "BASELINES",
    "NODES",
    "TARGETS",
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
    "parse_target",
    "reap",
    "register_baseline",
    "register_target",
    "rollout",
    "router_weight",
    "target_help",
]
