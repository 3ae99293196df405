"""Rules for cotangents, gates on what a model computes, and the reading that bundles both."""

from moejax.rules.attnlrp import CPLRP, AttnLRP
from moejax.rules.gates import Gates
from moejax.rules.reading import Reading
from moejax.rules.rule import Plain, Rule

__all__ = ["CPLRP", "AttnLRP", "Gates", "Plain", "Reading", "Rule"]
