"""Settings: which values are refused with a hint, and which need another compiled program."""

import jax
import pytest

import moejax
from generation.reference import PROMPTS
from moejax import MoejaxError, PromptError
from moejax.generation import Sampling, decode

REFUSED = [
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"top_k": -1, "temperature": 1.0},
    {"top_p": 0.0, "temperature": 1.0},
    {"top_p": 1.1, "temperature": 1.0},
    {"min_new_tokens": -1},
    {"repetition_penalty": 0.0},
    {"no_repeat_ngram_size": -2},
    {"bad_words": [[3], []]},
    {"bad_words": [[3, -1]]},
    {"num_beams": 0},
    {"length_penalty": float("inf"), "num_beams": 2},
    {"num_beams": 2, "temperature": 0.5},
    {"num_beams": 2, "num_return_sequences": 3},
    {"num_return_sequences": 0},
    {"num_return_sequences": 2},
    {"top_k": 5},
    {"top_p": 0.5},
    {"length_penalty": 0.5},
    {"early_stopping": True},
]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_values_out_of_range_or_without_effect_are_refused(settings: dict) -> None:
    with pytest.raises(MoejaxError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_time": 0.0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"bad_words": [[5, 53]]},
        {"eos_ids": [-1]},
        {"pad_id": -1},
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_call_are_refused(options: dict, toy_lm: moejax.LM) -> None:
    with pytest.raises(MoejaxError, match=next(iter(options))):
        toy_lm.generate_ids([PROMPTS[0]], **options)


def test_several_answers_need_a_list_of_prompts() -> None:
    with pytest.raises(PromptError, match="list"):
        moejax.load("tiny-olmoe").generate("Once", temperature=1.0, num_return_sequences=2)


def test_settings_are_hashable_and_lists_become_tuples() -> None:
    assert hash(Sampling(bad_words=[[1, 2], [3]])) == hash(Sampling(bad_words=((1, 2), (3,))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"temperature": 0.5, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.9}),
        ({"repetition_penalty": 1.5, "min_new_tokens": 3}, {"repetition_penalty": 0.7, "min_new_tokens": 4}),
        ({"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.6}),
    ],
    ids=str,
)
def test_other_numbers_are_the_same_program(one: dict, other: dict) -> None:
    structures = {jax.tree.structure(Sampling(**settings)) for settings in (one, other)}
    assert len(structures) == 1
    assert len(jax.tree.leaves(Sampling(**one))) >= 1


def test_settings_survive_as_a_tree() -> None:
    for sampling in (Sampling(), Sampling(0.5, 3, 0.9, 4, 1.5, 2, [[1], [2, 3]], num_return_sequences=2)):
        assert jax.tree.map(lambda x: x, sampling) == sampling


def test_another_temperature_is_not_compiled_anew(toy_lm: moejax.LM) -> None:
    options = {"max_new_tokens": 12, "top_k": 20, "num_return_sequences": 2}
    toy_lm.generate_ids(PROMPTS, temperature=1.3, top_p=0.95, **options)
    before = decode._generate.jitted._cache_size()
    toy_lm.generate_ids(PROMPTS, temperature=0.7, top_p=0.5, **options)
    assert decode._generate.jitted._cache_size() == before


def test_a_message_quotes_the_values_as_given() -> None:
    with pytest.raises(MoejaxError, match=r"^top_p=1\.1: a probability above 0, or 1 to keep all\.$"):
        Sampling(top_p=1.1, temperature=1.0)
    with pytest.raises(MoejaxError, match=r"^num_return_sequences=3 of num_beams=2: ask for at most as many"):
        Sampling(num_beams=2, num_return_sequences=3)
