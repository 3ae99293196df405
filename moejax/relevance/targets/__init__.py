"""Targets: logits, differences of logits, log-probabilities, a router's choice, a direction of the stream."""

from moejax.relevance.targets.answers import Continuation, Generated, Role, Span
from moejax.relevance.targets.base import TARGETS, Target, TargetLike, TargetTerms, checked_target, register_target
from moejax.relevance.targets.direction import Direction
from moejax.relevance.targets.logits import Argmax, Contrast, LogProbability, MeanContrast, Token
from moejax.relevance.targets.router_choice import RouterChoice
from moejax.relevance.targets.text import parse_target, target_help

__all__ = [
    "TARGETS",
    "Argmax",
    "Continuation",
    "Contrast",
    "Direction",
    "Generated",
    "LogProbability",
    "MeanContrast",
    "Role",
    "RouterChoice",
    "Span",
    "Target",
    "TargetLike",
    "TargetTerms",
    "Token",
    "checked_target",
    "parse_target",
    "register_target",
    "target_help",
]
