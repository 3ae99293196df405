"""Relevance of an edited forward pass: the ledger names what edits add, and padding changes nothing."""

import numpy as np
import pytest
from tiny.compare import close
from tiny.decoders import PROMPT, D, best_and_worst, mixture_lm

from moejax import Contrast, Edits, MoejaxError, explain, explain_batch
from moejax.rules import RULES

RNG = np.random.default_rng(0)
EDITS = (
    Edits()
    .set("stream.0", RNG.normal(size=D), tokens=[-3])
    .add("stream.1", RNG.normal(size=(2, D)), tokens=[2, 4])
    .add("stream.2", 0.1)
    .scale("heads.0", 0.3, heads=[1])
    .add("expert_outputs.0", RNG.normal(size=D), experts=[3])
    .add("neurons.0", 0.3)
    .add("attention_expert_outputs.1", 0.4)
    .add("shared.0", 0.5)
    .add("router_logits.0", 1.5, experts=[2])
    .scale("router_scores.0", 1.2)
    .set("expert_weights.0", 0.4, tokens=[1])
    .scale("attention_expert_weights.1", 0.5)
)
"""An edit of every kind, at nodes that the rules treat differently."""
EVERY_RULE = [rule if rule == "attnlrp-uniform" else pytest.param(rule, marks=pytest.mark.slow) for rule in RULES]


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_the_ledger_closes(rule: str, x64: None) -> None:
    found = explain(mixture_lm(), PROMPT, edits=EDITS, rule=rule, target=Contrast(5, 60))
    ledger = found.ledger
    assert np.abs(ledger.residual).max() <= 1e-12 * np.abs(ledger.target).max()
    # the leak of each layer; set tokens give their relevance to the edit
    assert (np.abs(ledger.leaks["edits"]).max(0) > 1e-9).all()
    assert not found.layers[0, 0, -3].any()


def test_what_an_added_vector_takes_is_its_effect_on_a_linear_path(x64: None) -> None:
    lm, aim = mixture_lm(), best_and_worst(mixture_lm())
    vector = RNG.normal(size=(1, D))
    edits = Edits().add("stream.2", vector, tokens=[-1])
    found = explain(lm, PROMPT, edits=edits, target=aim, nodes=["stream.2"])
    stream = lm.run_with_cache(PROMPT, names="stream.2", edits=edits)[1]["stream.2"]
    # at the final stream relevance is x c: the vector's share is that of its numbers
    share = (found.vectors["stream.2"][0, -1] * vector[0] / np.asarray(stream)[0, -1]).sum()
    np.testing.assert_allclose(found.ledger.leaks["edits"].sum(), share, rtol=1e-9)


@pytest.mark.slow
def test_batches_and_refusals(x64: None) -> None:
    lm, edits = mixture_lm(), Edits().add("middle.0", 0.5, tokens=[1]).scale("feed_forward.1", 0.5)
    batch = explain_batch(lm, [PROMPT, PROMPT[:4]], edits=edits, target=Contrast(5, 60))
    close(batch[1].tokens, explain(lm, PROMPT[:4], edits=edits, target=Contrast(5, 60)).tokens, 1e-10)
    with pytest.raises(MoejaxError, match="differ in length"):
        explain_batch(lm, [PROMPT, PROMPT[:4]], edits=Edits().add("middle.0", 0.5, tokens=[-1]))
    with pytest.raises(MoejaxError, match="pattern that is edited"):
        explain(lm, PROMPT, edits=Edits().scale("edges.0", 2.0))
    with pytest.raises(MoejaxError, match="names its tokens"):
        explain(lm, PROMPT, edits=Edits().add("middle.0", np.ones((len(PROMPT), 1))))
    with pytest.raises(MoejaxError, match="inside of a router"):
        explain(lm, PROMPT, nodes=["router_logits.0"])
