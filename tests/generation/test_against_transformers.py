"""Whole answers equal those of transformers: greedy with each processor, and beam search with its scores.

moejax reads all prompts as one left-padded batch, transformers reads them one by one.
"""

from typing import Any

import numpy as np
import pytest
import torch
from tiny.hugging_face import loaded, torch_model

import moejax
from generation.reference import NEW, PAD, PROMPTS, theirs
from moejax.generation import Generation, decode

SHORT = 16


def options_of(name: str, greedy: list[list[int]]) -> dict[str, Any]:
    """Settings that change what the model says without them."""
    words = [[greedy[0][3]], greedy[1][4:6], greedy[2][2:5], [greedy[0][0], greedy[0][2]]]
    ends = {"eos_ids": (greedy[0][5], greedy[1][2], greedy[2][7]), "min_new_tokens": 11}
    single = {
        "repetition": {"repetition_penalty": 1.6},
        "ngrams": {"no_repeat_ngram_size": 2},
        "words": {"bad_words": words},
        "ends": ends,
    }
    return single[name] if name in single else {k: v for settings in single.values() for k, v in settings.items()}


def their_names(options: dict[str, Any]) -> dict[str, Any]:
    return {"bad_words_ids" if k == "bad_words" else k: v for k, v in options.items()}


def rows(generation: Generation) -> list[list[int]]:
    """The answers, with the tokens that ended them."""
    lengths = np.asarray(generation.lengths)
    return [row[:length] for row, length in zip(np.asarray(generation.tokens).tolist(), lengths, strict=True)]


@pytest.mark.parametrize("name", ["repetition", "ngrams", "words", "ends", "all"])
def test_greedy_with_processors(name: str, toy_lm: moejax.LM, toy_torch: Any, greedy: list[list[int]]) -> None:
    options = options_of(name, greedy)
    generation = toy_lm.generate_tokens(PROMPTS, max_new_tokens=NEW, return_scores=name == "all", **options)
    wanted = [theirs(toy_torch, prompt, NEW, **their_names(options)) for prompt in PROMPTS]
    assert rows(generation) == [w.new[0] for w in wanted]
    assert all(got != plain for got, plain in zip(rows(generation), greedy, strict=True))
    if name == "all":
        same_scores(generation, wanted)
    else:
        assert generation.scores is None
        assert generation.log_probs is None


def same_scores(generation: Generation, wanted: list[Any]) -> None:
    for row, want in enumerate(wanted):
        count, tokens = len(want.scores), torch.tensor(want.new)
        scores = torch.cat(want.scores).numpy()
        np.testing.assert_allclose(generation.scores[row, :count], scores, rtol=1e-4, atol=1e-4)
        plain = torch.cat(want.logits).log_softmax(-1).gather(1, tokens.T)[:, 0]
        np.testing.assert_allclose(generation.log_probs[row, :count], plain, rtol=1e-5, atol=1e-5)
        assert not np.asarray(generation.scores[row, count:]).any()
        assert not np.asarray(generation.log_probs[row, count:]).any()
    assert min(len(w.scores) for w in wanted) < NEW, "one row must end early"


def same_beams(generation: Generation, model: Any, prompts: list[list[int]], wanted: list[Any]) -> None:
    answers, beams, row = rows(generation), len(wanted[0].new), 0
    for prompt, want in zip(prompts, wanted, strict=True):
        chosen = model.compute_transition_scores(want.sequences, want.scores, want.beam_indices).numpy()
        for beam, tokens in enumerate(want.new):
            length = len(answers[row])
            assert answers[row] == tokens[:length], (prompt, beam)
            assert set(tokens[length:]) <= {PAD}
            np.testing.assert_allclose(generation.sequence_scores[row], want.sequences_scores[beam], rtol=1e-5)
            if generation.scores is not None:
                got = np.asarray(generation.scores)[row, np.arange(length), answers[row]]
                np.testing.assert_allclose(got, chosen[beam, :length], rtol=1e-4, atol=1e-5)
                assert not np.asarray(generation.scores[row, length:]).any()
            row += 1
    assert row == len(answers) == beams * len(prompts)


@pytest.fixture(scope="module")
def few_ends(toy_torch: Any) -> tuple[int, ...]:
    """Two tokens that several beams choose, at several positions."""
    beams = [theirs(toy_torch, prompt, SHORT, num_beams=3, num_return_sequences=3) for prompt in PROMPTS]
    return beams[0].new[0][4], beams[1].new[0][11]


@pytest.fixture(scope="module")
def many_ends(toy_torch: Any) -> tuple[int, ...]:
    """Seven likely first tokens of a prompt, so that more candidates end at once than twice the number of beams."""
    return tuple(theirs(toy_torch, PROMPTS[1], 1).logits[0][0].topk(7).indices.tolist())


@pytest.mark.parametrize(
    ("early_stopping", "which", "length_penalties"),
    [(True, "few_ends", (1.0, 0.6)), (False, "few_ends", (1.0, 0.6)), ("never", "many_ends", (1.0,))],
    ids=["early", "heuristic", "never"],
)
def test_beam_search(
    early_stopping: Any,
    which: str,
    length_penalties: tuple[float, ...],
    toy_lm: moejax.LM,
    toy_torch: Any,
    request: pytest.FixtureRequest,
) -> None:
    ends, lengths = request.getfixturevalue(which), []
    for length_penalty in length_penalties:
        options = {"num_beams": 3, "length_penalty": length_penalty, "early_stopping": early_stopping}
        options |= {"num_return_sequences": 3, "eos_ids": ends}
        generation = toy_lm.generate_tokens(PROMPTS, max_new_tokens=SHORT, return_scores=True, **options)
        wanted = [theirs(toy_torch, prompt, SHORT, **options) for prompt in PROMPTS]
        same_beams(generation, toy_torch, PROMPTS, wanted)
        lengths += np.asarray(generation.lengths).tolist()
        # without processors, what beams are ranked by is the model's own probability
        summed = np.asarray(generation.log_probs).sum(1) / np.asarray(generation.lengths) ** length_penalty
        np.testing.assert_allclose(summed, generation.sequence_scores, rtol=1e-5)
    assert len(set(lengths)) > 3, "answers must end at many places"


@pytest.mark.parametrize("family", ["gpt_oss", "jetmoe"])
def test_beam_search_with_processors_of_other_families(family: str) -> None:
    """Caches of windows, sinks and attention experts are reordered as the beams are."""
    prompts, two = [[7, 31, 8, 44, 17, 90], [12, 5, 60]], {"num_hidden_layers": 2}
    options = {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    generation = loaded(family, **two).generate_tokens(prompts, max_new_tokens=SHORT, pad_id=PAD, **options)
    model = torch_model(family, **two)
    same_beams(generation, model, prompts, [theirs(model, prompt, SHORT, **options) for prompt in prompts])


class Clock:
    """A clock that advances by one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize("max_time", [8.0, 1e6])
def test_time_limit(
    max_time: float, toy_lm: moejax.LM, greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "time", Clock())
    generation = toy_lm.generate_tokens(PROMPTS, max_new_tokens=NEW, max_time=max_time)
    steps = int(generation.lengths[0])
    assert (1 < steps < NEW / 2) if max_time == 8 else steps == NEW
    assert rows(generation) == [row[:steps] for row in greedy]
    assert toy_lm.generate_ids(PROMPTS, max_new_tokens=NEW, max_time=1e6) == greedy


def test_time_limit_of_beams(toy_lm: moejax.LM, toy_torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit the running beams become the answers, as if the number of tokens had been limited."""
    monkeypatch.setattr(decode, "time", Clock())
    options = {"num_beams": 3, "num_return_sequences": 2}
    generation = toy_lm.generate_tokens(PROMPTS[:1], max_new_tokens=NEW, max_time=6.0, **options)
    steps = int(generation.lengths[0])
    assert 1 < steps < NEW / 2
    same_beams(generation, toy_torch, PROMPTS[:1], [theirs(toy_torch, PROMPTS[0], steps, **options)])
