"""Rules for cotangents, gates and edits of what a model computes, and the reading that bundles them."""

import warnings
from typing import Any

# isort: off
# in this order RULES lists the rules
from moejax.rules.attnlrp import AttnLRP
from moejax.rules.cplrp import CPLRP
from moejax.rules.gim import GIM
from moejax.rules.gamma import Gamma
from moejax.rules.proportional import Proportional
from moejax.rules.plain import Plain

# isort: on
from moejax.rules.activations import Activations
from moejax.rules.direct import Direct
from moejax.rules.edits import Edits
from moejax.rules.gates import Gates
from moejax.rules.nodes import NODES
from moejax.rules.reading import Reading
from moejax.rules.registry import RULES, by_name, register_rule
from moejax.rules.rule import Rule

__all__ = [
    "CPLRP",
    "GIM",
    "NODES",
    "RULES",
    "Activations",
    "AttnLRP",
    "Direct",
    "Edits",
    "Gamma",
    "Gates",
    "Plain",
    "Proportional",
    "Reading",
    "Rule",
    "by_name",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    if name == "Backtrace":
        warnings.warn("moejax.rules.Backtrace is now moejax.rules.Proportional.", DeprecationWarning, stacklevel=2)
        return Proportional
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
