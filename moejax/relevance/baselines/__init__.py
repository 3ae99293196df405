"""Scores of other methods, to compare relevance with, in the call form of ``explain``.

Most of them are read at the gates: such a method is a rule under which a gate's cotangent is the method's score. A new
method is one file with a function under :func:`register_baseline`.
"""

# isort: off
# in this order BASELINES lists the methods
from moejax.relevance.baselines.path_integrals import integrated_gradients
from moejax.relevance.baselines.attention_rollout import rollout
from moejax.relevance.baselines.direct_attribution import direct_logit_attribution
from moejax.relevance.baselines.observed import activation_norm, frequency, reap, router_weight

# isort: on
from moejax.relevance.baselines.scores import BASELINES, Baseline, Scores, register_baseline
from moejax.rules import Activations, Direct

__all__ = [
    "BASELINES",
    "Activations",
    "Baseline",
    "Direct",
    "Scores",
    "activation_norm",
    "direct_logit_attribution",
    "frequency",
    "integrated_gradients",
    "reap",
    "register_baseline",
    "rollout",
    "router_weight",
]
