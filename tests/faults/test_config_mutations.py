"""Mutated configs of all families: each loads or is refused in one line, at no cost worth naming."""

import copy
import random
import time
import warnings

import pytest

from faults.mutations import FAMILIES, base, entries, mutations, outcome, outcomes, resident
from moejax.models import family


def test_some_mutations() -> None:
    found = outcomes(seed=0, count=300)
    assert found.total() == 300
    assert found["loads as before"] > 30
    assert found["refused by a ConfigError"] > 80


@pytest.mark.slow
def test_many_mutations_and_what_each_costs() -> None:
    for name in FAMILIES:
        entries(name)
    before = resident()
    for config in mutations(random.Random(1), 5000):
        begun = time.process_time()
        outcome(config)
        assert time.process_time() - begun < 5
    assert resident() - before < 300 << 20


@pytest.mark.slow
def test_what_loads_is_what_transformers_reads() -> None:
    """The config that transformers makes of the fields, with its own defaults and names, describes the same model."""
    import transformers

    compared = 0
    for config in mutations(random.Random(2), 2000):
        name = config.get("model_type")
        if name == "moejax" or not outcome(config).startswith("loads"):
            continue
        try:
            theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
        except Exception:  # it refuses some fields that change nothing
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert family(name).config(config) == family(name).config(theirs), (config, base(str(name)))
        compared += 1
    assert compared > 200
