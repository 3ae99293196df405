"""Ordinary calculus as a rule."""

from dataclasses import dataclass

from moejax.rules.registry import register_rule
from moejax.rules.rule import Rule


@register_rule("plain")
@dataclass(frozen=True)
class Plain(Rule):
    """Ordinary calculus. Read at the gates it is gradient times input."""
