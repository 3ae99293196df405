"""Targets by name and from text; targets and baselines that are registered outside of the package."""

from dataclasses import dataclass

import pytest
from tiny.decoders import PROMPT, T, make_lm

from moejax import Contrast, MoejaxError, PromptError, RouterChoice, Span, Token, explain
from moejax.relevance import BASELINES, TARGETS, Target, parse_target, register_baseline, register_target, target_help
from moejax.relevance.targets import TargetTerms

NAMES = {
    *("argmax", "continuation", "contrast", "direction", "generated"),
    *("log_probability", "mean_contrast", "router_choice", "span", "token"),
}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("router_choice layer=3 expert=1 versus=2", RouterChoice(3, 1, 2)),
        ("router_choice  versus=2 expert=1 attention=true layer=-1", RouterChoice(-1, 1, 2, attention=True)),
        ('token token=" Paris"', Token(" Paris")),
        ("token token=Paris position=2", Token("Paris", 2)),
        ("token token=5", Token(5)),
        ('contrast token="a=b c" other=[" London", 5]', Contrast("a=b c", [" London", 5])),
        (" span answer=[3,1,4] ", Span([3, 1, 4])),
    ],
)
def test_text(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens token=5", "target 'tokens' is unknown; choose from argmax, token"),
        (
            "router_choice layer=3",
            r"needs expert, versus; its fields are layer, expert, versus, position=-1, attention=f",
        ),
        ("token token=5 at=3", "does not understand 'at=3'; its fields are token, position=-1"),
        ("token Paris", "does not understand 'Paris'"),
        ('token token="Paris', "the value of 'token' is no JSON"),
        ("token token=", "the value of 'token' is no JSON"),
        ("token token=5 position=last", 'position="last" is not of type int'),
        ("router_choice layer=true expert=1 versus=2", "layer=true is not of type int"),
    ],
)
def test_errors(text, message):
    with pytest.raises(PromptError, match=message):
        parse_target(text)


def test_help_has_a_line_for_each():
    assert set(TARGETS) >= NAMES
    lines = target_help()
    assert lines.keys() == TARGETS.keys()
    assert all(line.endswith(".") for line in lines.values())


def test_a_target_and_a_baseline_from_outside():
    @register_target("test_second")
    @dataclass(frozen=True)
    class Second(Target):
        """The logit of a token, after the second token."""

        token: int

        def resolve(self, lm, prompt):
            return prompt, [TargetTerms(1, ((self.token, 1.0),))]

    lm = make_lm()
    found = explain(lm, PROMPT, target=parse_target("test_second token=11"))
    assert found.ledger.target == explain(lm, PROMPT, target=Token(11, position=1)).ledger.target

    @register_baseline("test-frequency", variants={"test-of-router": {"name": "router-weight"}})
    def other(lm, prompt, *, target=None, name="frequency"):
        return BASELINES[name](lm, prompt)

    assert BASELINES["test-frequency"](lm, PROMPT).method == "frequency"
    assert BASELINES.find("test-of-router")(lm, PROMPT).method == "router weight"
    with pytest.raises(MoejaxError, match="a baseline 'reap' is registered already"):
        register_baseline("reap")(other)


def test_results_are_printed_in_a_line():
    lm = make_lm()
    result = explain(lm, PROMPT, target=Token(11))
    assert repr(result).startswith(f"Relevance(model='{lm.name}', rule=AttnLRP(router='constant'), targets=")
    assert f"T={T}, " in repr(result)
    assert len(repr(result)) < 200
    assert repr(result.ledger).startswith("Ledger(targets=1, leaks=[")
    assert repr(BASELINES["reap"](lm, PROMPT)).startswith("Scores('REAP', targets=")
