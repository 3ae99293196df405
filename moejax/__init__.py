"""Mixture-of-Experts language models for JAX researchers: load, run, explain, train."""

from moejax import rules
from moejax.errors import CheckpointError, ConfigError, MoejaxError, PromptError
from moejax.lm import LM, load
from moejax.relevance import Argmax, Continuation, Contrast, Generated, Relevance, Token, explain, explain_batch
from moejax.rules import Gates

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Argmax",
    "CheckpointError",
    "ConfigError",
    "Continuation",
    "Contrast",
    "Gates",
    "Generated",
    "MoejaxError",
    "PromptError",
    "Relevance",
    "Token",
    "explain",
    "explain_batch",
    "load",
    "rules",
]
