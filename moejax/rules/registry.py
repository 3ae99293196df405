"""Rules by name, for the command line and for ``explain(.., rule="gim")``."""

from collections.abc import Mapping

from moejax.errors import MoejaxError
from moejax.rules.attnlrp import CPLRP, AttnLRP
from moejax.rules.gamma import Gamma
from moejax.rules.gim import GIM
from moejax.rules.proportional import Proportional
from moejax.rules.rule import Plain, Rule

RULES: Mapping[str, Rule] = {
    "attnlrp": AttnLRP(),
    "attnlrp-uniform": AttnLRP(router="uniform"),
    "attnlrp-gradient": AttnLRP(router="gradient"),
    "attnlrp-proportional": AttnLRP(router="proportional"),
    "cplrp": CPLRP(),
    "gim": GIM(),
    "gamma": Gamma(),
    "backtrace": Proportional(),
    "backtrace-masked": Proportional(saturation=True),
    "plain": Plain(),
}
"""Every rule with its defaults, and its variants."""


def by_name(rule: Rule | str) -> Rule:
    """The rule of that name; a rule is returned as it is.

    Raises:
        MoejaxError: there is none of that name.
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise MoejaxError(f"rule {rule!r} is unknown; choose from {', '.join(RULES)}.")
    return RULES[rule]
