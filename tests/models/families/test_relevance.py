"""The ledger closes in every family, and every kind of expert can be read and switched off."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.hugging_face import FAMILIES, KINDS, loaded, random_batch

import moejax
from moejax.rules import CPLRP, AttnLRP, Gates, Proportional, Rule

RULES = [*moejax.rules.RULES.values(), CPLRP(router="uniform")]
MAIN = [AttnLRP(), AttnLRP(router="uniform"), CPLRP(), Proportional()]
# those whose parts differ: plain mixture, shared expert, biases and sinks, experts in attention
DIFFERENT = ["olmoe", "qwen2_moe", "gpt_oss", "jetmoe"]


def contrast(lm: moejax.LM, prompt: np.ndarray) -> moejax.Contrast:
    """Best against worst token: a target that is not small by accident."""
    logits = np.asarray(lm(prompt))[0, -1]
    return moejax.Contrast(int(logits.argmax()), int(logits.argmin()))


def prompt_of(length: int = 23) -> np.ndarray:
    return random_batch()[0][0, :length]


def families_and_rules(often: dict[Rule, Sequence[str]]) -> pytest.MarkDecorator:
    """All families with all rules; for each rule the families that are run often, the others are slow."""
    pairs = [(family, rule) for rule in dict.fromkeys([*MAIN, *RULES]) for family in FAMILIES]
    marks = [[] if family in often.get(rule, ()) else [pytest.mark.slow] for family, rule in pairs]
    params = [pytest.param(*pair, marks=mark) for pair, mark in zip(pairs, marks, strict=True)]
    return pytest.mark.parametrize(("family", "rule"), params, ids=repr)


@families_and_rules({MAIN[0]: ["gpt_oss"]})
def test_ledger_closes(family: str, rule: Rule) -> None:
    lm, prompt = loaded(family), prompt_of()
    ledger = moejax.explain(lm, prompt, target=contrast(lm, prompt), rule=rule).ledger
    assert np.abs(ledger.residual / ledger.target).max() <= 1e-5


@families_and_rules({MAIN[0]: KINDS} | {rule: ["gpt_oss", "jetmoe"] for rule in MAIN[1:]})
def test_ledger_closes_in_float64(family: str, rule: Rule) -> None:
    with jax.enable_x64(True):
        decoder = jax.tree.map(lambda p: p.astype(jnp.float64), loaded(family).decoder)
        lm, prompt = moejax.LM(decoder), prompt_of(13)
        ledger = moejax.explain(lm, prompt, target=contrast(lm, prompt), rule=rule).ledger
        assert np.abs(ledger.residual / ledger.target).max() <= 1e-12


@pytest.mark.parametrize("family", DIFFERENT)
def test_conserving_rule_leaks_only_biases(family: str) -> None:
    lm, prompt = loaded(family), prompt_of()
    leaks = moejax.explain(lm, prompt, rule=CPLRP()).ledger.leaks
    biased = family in ("gpt_oss", "jetmoe", "llama", "qwen2_moe")
    assert set(leaks) == ({"bias"} if biased else set())


def test_kinds_of_experts() -> None:
    jetmoe = moejax.explain(loaded("jetmoe"), prompt_of(11))
    assert jetmoe.attention is not None
    assert jetmoe.attention.slots.shape == (1, 4, 11, 2)
    assert jetmoe.attention.by_expert().shape == (1, 4, 6)
    assert not np.array_equal(jetmoe.attention.ids, jetmoe.expert_ids)
    shared = moejax.explain(loaded("qwen2_moe"), prompt_of(11)).shared
    assert shared is not None
    assert shared.shape == (1, 4, 11, 1)
    # every second layer of this model is dense
    assert not shared[:, ::2].any()
    assert shared[:, 1].all()
    # behind the last layer nothing but the target's own position counts
    assert shared[:, 3, -1].all()
    assert not shared[:, 3, :-1].any()


def test_dense_layers_have_no_routed_slots() -> None:
    relevance = moejax.explain(loaded("qwen3_moe"), prompt_of(11))
    assert (relevance.expert_ids[1] == -1).all()
    assert not relevance.experts[:, 1].any()
    assert not relevance.by_expert()[:, 1].any()
    assert np.allclose(relevance.by_expert().sum(-1), relevance.experts.sum((-1, -2)), atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "jetmoe"])
def test_relevance_of_attention_block_is_that_of_its_heads(family: str) -> None:
    """Heads partition what enters the output projection; with mixtures, slots partition what leaves it (no bias)."""
    lm, prompt = loaded(family), prompt_of(11)
    relevance = moejax.explain(lm, prompt, rule=CPLRP())
    if relevance.attention is not None:
        per_slot = relevance.heads.reshape(*relevance.heads.shape[:-1], 2, 3).sum(-1)
        assert np.allclose(per_slot, relevance.attention.slots, atol=1e-5)
    else:
        assert relevance.heads.shape[-1] == lm.config.num_heads


@pytest.mark.parametrize(
    ("family", "kind"),
    [("jetmoe", "attention expert"), ("jetmoe", "expert"), ("qwen3_moe", "expert"), ("gpt_oss", "head")],
)
def test_switching_off_equals_zero_weights(family: str, kind: str) -> None:
    """A gate at zero is the model whose expert (or head) contributes nothing."""
    lm, prompt = loaded(family), prompt_of(11)
    relevance = moejax.explain(lm, prompt)
    gates, without = Gates.ones(lm.config, prompt), jax.tree.map(lambda p: p, lm.decoder)
    layer = without.layers[2]
    if kind == "attention expert":
        expert = int(relevance.attention.ids[2, -1, 0])
        gates = gates.drop_attention_expert(2, expert)
        layer.attention.output = layer.attention.output.at[expert].set(0)
    elif kind == "expert":
        expert = int(relevance.expert_ids[2, -1, 0])
        gates = gates.drop_expert(2, expert)
        layer.feed_forward.experts.down = layer.feed_forward.experts.down.at[expert].set(0)
    else:
        columns = slice(5 * lm.config.head_dim, 6 * lm.config.head_dim)
        gates = gates.drop_head(2, 5)
        layer.attention.output.weight = layer.attention.output.weight.at[:, columns].set(0)
    gated = np.asarray(lm(prompt, gates=gates))
    assert np.allclose(gated, np.asarray(moejax.LM(without)(prompt)), atol=1e-5)
    assert not np.allclose(gated, np.asarray(lm(prompt)), atol=1e-3)
