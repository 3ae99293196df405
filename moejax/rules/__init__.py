"""Rules for cotangents, gates on what a model computes, and the reading that bundles both."""

from moejax.rules.attnlrp import CPLRP, AttnLRP
from moejax.rules.gamma import Gamma
from moejax.rules.gates import Gates
from moejax.rules.gim import GIM
from moejax.rules.proportional import Proportional
from moejax.rules.reading import Reading
from moejax.rules.registry import RULES, by_name
from moejax.rules.rule import Plain, Rule

__all__ = [
    "CPLRP",
    "GIM",
    "RULES",
    "AttnLRP",
    "Gamma",
    "Gates",
    "Plain",
    "Proportional",
    "Reading",
    "Rule",
    "by_name",
]
