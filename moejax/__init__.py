"""Mixture-of-Experts language models for JAX researchers: load, run, explain, train."""

from moejax import rules, xla
from moejax._version import __version__ as __version__
from moejax.checkpoints import convert, export, get_model_config, list_supported_models
from moejax.dlbacktrace import Backtrace
from moejax.errors import CheckpointError, ConfigError, MoejaxError, PromptError
from moejax.layers import MoeArgs, MoeLayer, get_moe, register_moe
from moejax.lm import LM, load
from moejax.models import EXPERT, EXPERT_TENSOR, TENSOR, apply, nodes, register_family
from moejax.prompts import Chat
from moejax.relevance import (
    Argmax,
    Cell,
    Continuation,
    Contrast,
    Direction,
    Generated,
    LogProbability,
    MeanContrast,
    Relevance,
    Role,
    RouterChoice,
    Span,
    Token,
    ablate,
    baselines,
    explain,
    explain_batch,
    register_baseline,
    register_target,
)
from moejax.report import register_plot
from moejax.rules import Edits, Gates, register_rule

xla.without_library_sums()

__all__ = [
    "EXPERT",
    "EXPERT_TENSOR",
    "LM",
    "TENSOR",
    "Argmax",
    "Backtrace",
    "Cell",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "Continuation",
    "Contrast",
    "Direction",
    "Edits",
    "Gates",
    "Generated",
    "LogProbability",
    "MeanContrast",
    "MoeArgs",
    "MoeLayer",
    "MoejaxError",
    "PromptError",
    "Relevance",
    "Role",
    "RouterChoice",
    "Span",
    "Token",
    "ablate",
    "apply",
    "baselines",
    "convert",
    "explain",
    "explain_batch",
    "export",
    "get_model_config",
    "get_moe",
    "list_supported_models",
    "load",
    "nodes",
    "register_baseline",
    "register_family",
    "register_moe",
    "register_plot",
    "register_rule",
    "register_target",
    "rules",
]
