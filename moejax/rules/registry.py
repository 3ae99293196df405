"""Relevance rules by name, for the command line and for ``explain(.., rule="gim")``."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moejax.errors import ConfigError
from moejax.registry import Registry
from moejax.rules.rule import Rule

RuleClass = TypeVar("RuleClass", bound=Rule)

RULES: Registry[Rule] = Registry("rule", "moejax.rules")
"""Every rule with its defaults, and its variants, by name."""

_RENAMED = {"backtrace": "proportional", "backtrace-masked": "proportional-masked"}


def register_rule(
    name: str, variants: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[type[RuleClass]], type[RuleClass]]:
    """Decorator that enters a rule's class in :data:`RULES`.

    Args:
        name: name of the rule with its defaults.
        variants: names of further instances, with the arguments that make each of them:
            ``{"attnlrp-uniform": {"router": "uniform"}}``.

    Raises:
        ConfigError: another class has one of the names, or a name is no string.
    """
    if not isinstance(name, str):
        raise ConfigError('give the rule a name: @register_rule("my_rule").')

    def enter(rule: type[RuleClass]) -> type[RuleClass]:
        for key, arguments in {name: {}, **(variants or {})}.items():
            RULES.add(key, rule(**arguments), origin=rule)
        return rule

    return enter


def by_name(rule: Rule | str) -> Rule:
    """Return the rule of that name; return a rule as it is.

    Raises:
        MoejaxError: no rule has that name.
    """
    if isinstance(rule, Rule):
        return rule
    if rule in _RENAMED:
        new = _RENAMED[rule]
        # one level up is the public function that the name was given to
        warnings.warn(f"the rule {rule!r} is now called {new!r}.", DeprecationWarning, stacklevel=3)
        rule = new
    return RULES.find(rule)
