"""Generation under edits: the same as running the whole sequence anew for every token."""

import numpy as np
import pytest
from tiny.decoders import LAYERS, PROMPT, D, make_lm

from moejax import LM, Edits, MoejaxError

SHORT = [33, 12, 5]
NEW = 4


def lm() -> LM:
    """A model of two layers."""
    return make_lm(layers=LAYERS)


def rerun(prompt: list[int], edits: Edits) -> list[int]:
    """Greedy tokens, each from a whole forward pass of one length, whose last columns nothing has attended to."""
    ids, length = list(prompt), len(PROMPT) + NEW
    for _ in range(NEW):
        logits = lm()(ids + [0] * (length - len(ids)), edits=edits)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_equals_reruns_for_prompts_of_several_lengths() -> None:
    rng = np.random.default_rng(0)
    everywhere = rng.normal(size=D)
    # token 2 lies in both prompts, 4 in the longer one, 8 in neither
    edits = (
        Edits()
        .add("stream.1", everywhere)
        .set("middle.0", 3 * rng.normal(size=(3, D)), tokens=[2, 4, 8])
        .add("router_logits.1", 9.0, experts=[4])
        .scale("heads.0", -2.0, heads=[1], tokens=[5])
    )
    prompts = [PROMPT, SHORT]
    plain = lm().generate_ids(prompts, max_new_tokens=NEW)
    got = lm().generate_ids(prompts, max_new_tokens=NEW, edits=edits)
    assert got == [rerun(prompt, edits) for prompt in prompts]
    assert got != plain


@pytest.mark.slow
def test_values_by_prompt_hold_for_each_beam() -> None:
    vectors = np.random.default_rng(1).normal(size=(2, 1, D)) * 3
    options = {"max_new_tokens": NEW, "num_beams": 3}
    together = lm().generate_ids([PROMPT, SHORT], edits=Edits().add("stream.1", vectors), **options)
    for i, prompt in enumerate([PROMPT, SHORT]):
        assert together[i] == lm().generate_ids([prompt], edits=Edits().add("stream.1", vectors[i]), **options)[0]


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        (Edits().add("stream.1", 1, tokens=[-1]), r"can name 0 to"),
        (Edits().add("stream.1", np.ones((len(PROMPT), D))), r"tokens="),
        (Edits().add("stream.7", 1), "no node"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edits: Edits, says: str) -> None:
    with pytest.raises(MoejaxError, match=says):
        lm().generate_ids([PROMPT], max_new_tokens=NEW, edits=edits)
