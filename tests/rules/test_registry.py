"""Rules and gates by name: the table of rules, names from outside of the package, and names of the last version."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

import moejax
from moejax import Gates, MoejaxError
from moejax.rules import RULES, AttnLRP, Direct, Proportional, Rule, by_name, register_rule

NAMES = [
    *("attnlrp", "attnlrp-uniform", "attnlrp-gradient", "attnlrp-proportional", "cplrp", "gim", "gamma"),
    *("proportional", "proportional-masked", "plain"),
]


def test_the_order_of_names():
    assert [name for name in RULES if not name.startswith("test-")] == NAMES


def test_variants_are_instances():
    assert by_name("attnlrp") == AttnLRP()
    assert by_name("attnlrp-uniform") == AttnLRP(router="uniform")
    assert by_name("proportional-masked") == Proportional(saturation=True)
    assert by_name(Direct()) == Direct()


def test_a_rule_from_outside():
    @register_rule("test-halved", variants={"test-quarter": {"factor": 0.25}})
    @dataclass(frozen=True)
    class Halved(Rule):
        factor: float = 0.5

    assert by_name("test-halved") == Halved()
    assert by_name("test-quarter") == Halved(0.25)
    with pytest.raises(MoejaxError, match=r"a rule 'gim' is registered already: moejax.rules.gim.GIM"):
        register_rule("gim")(Halved)
    with pytest.raises(MoejaxError, match="rule 'halved' is unknown; choose from attnlrp, "):
        by_name("halved")


def test_old_names_of_rules():
    with pytest.warns(DeprecationWarning, match="'backtrace' is now called 'proportional'"):
        assert by_name("backtrace") == Proportional()
    with pytest.warns(DeprecationWarning, match="'backtrace-masked' is now called 'proportional-masked'"):
        assert by_name("backtrace-masked") == Proportional(saturation=True)
    with pytest.warns(DeprecationWarning, match=r"moejax.rules.Backtrace is now moejax.rules.Proportional"):
        assert moejax.rules.Backtrace is Proportional


def test_old_names_of_gates():
    ones = jnp.ones((1, 1, 1, 6))
    with pytest.warns(DeprecationWarning, match=r"Gates\(shares=\) is now Gates\(routing_weights=\)"):
        gates = Gates(shares=ones)
    assert gates.routing_weights is ones
    with pytest.warns(DeprecationWarning, match=r"Gates\(attention_choices=\) is now Gates\(attention_selectable=\)"):
        gates = replace(gates, selectable=ones, **{"attention_choices": ones})
    assert gates.attention_selectable is gates.selectable is gates.routing_weights is ones
    new = Gates(routing_weights=ones, selectable=ones, attention_selectable=ones)
    assert jax.tree.structure(gates) == jax.tree.structure(new)


def test_gates_are_printed_by_their_shapes():
    assert repr(Gates(heads=jnp.ones((3, 1, 7, 4)), tokens=jnp.ones((4, 1, 7)))) == (
        "Gates(tokens=[4, 1, 7], heads=[3, 1, 7, 4])"
    )
    assert repr(Gates()) == "Gates()"
