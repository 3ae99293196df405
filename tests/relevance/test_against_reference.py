"""The decoder and its relevance against a second implementation in numpy that shares no idea with it but the papers."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import LAYERS, PROMPT, ROW, VARIANTS, C, E, H, L, T, variant_lm

from moejax import LM, Contrast, Gates, Token, explain
from moejax.rules import CPLRP, AttnLRP
from relevance.reference import Edits, Reference

pytestmark = pytest.mark.usefixtures("x64")

every_variant = pytest.mark.parametrize("variant", VARIANTS)
RULES = [AttnLRP(), AttnLRP(router="uniform"), CPLRP()]


def toy(variant: str, layers: int = LAYERS) -> LM:
    return variant_lm(variant, dtype="float64", layers=layers)


def reference(lm: LM, edits: Edits | None = None) -> Reference:
    return Reference(lm.decoder, PROMPT, lm.config.blocks[0].rotary.rope.angles(jnp.arange(T)[None], C), edits)


def options(rule: AttnLRP) -> dict[str, str]:
    return {"pattern": "constant" if isinstance(rule, CPLRP) else "taylor", "router": rule.router}


@every_variant
def test_logits(variant):
    lm = toy(variant)
    got, want = np.asarray(lm(ROW))[0], reference(lm)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want.logits, rtol=1e-12, atol=1e-12)
    if variant == "clip-bias":
        assert np.mean([(np.abs(layer.q) == 0.8).mean() for layer in want.layers]) > 0.2, "the clamp must bite"


@pytest.mark.parametrize("rule", RULES, ids=repr)
@every_variant
def test_relevance(variant, rule):
    lm, position, (token, other) = toy(variant), 4, (11, 60)
    ours = explain(lm, PROMPT, target=Contrast(token, other, position), rule=rule)
    want = reference(lm).explain(position, {token: 1.0, other: -1.0}, **options(rule))
    np.testing.assert_allclose(ours.ledger.target, [want.target], rtol=1e-12)
    np.testing.assert_allclose(ours.layers[0], want.layers, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.tokens[0], want.layers[0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.experts[0], want.experts, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.heads[0], want.heads, rtol=1e-10, atol=1e-10)
    for found in (want.layers, want.experts, want.heads):
        assert (np.abs(found).max(axis=-1) > 1e-3).any(axis=-1).all(), "a comparison of zeros shows nothing"


@pytest.mark.parametrize("rule", RULES, ids=repr)
@every_variant
def test_leaks(variant, rule):
    """The ledger closes by construction where an operation is booked; so its entries are checked one by one."""
    lm = toy(variant)
    books = explain(lm, PROMPT, target=Contrast(11, 60, 4), rule=rule).ledger
    want = reference(lm).explain(4, {11: 1.0, 60: -1.0}, **options(rule)).lost
    assert set(books.leaks) == rule.leaks - (set() if lm.config.blocks[0].attention.bias else {"bias"})
    for name, by_layer in want.items():
        ours = books.leaks.get(name, np.zeros((1, LAYERS + 1)))[0]
        np.testing.assert_allclose(ours[:-1], by_layer, rtol=1e-10, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(ours[-1], 0, atol=1e-12, err_msg="final norm and head")


CELLS = [pytest.param(4, id="one-token"), pytest.param(None, id="all-tokens")]


class TestSwitchedOff:
    """A gate at zero equals a forward pass whose sums lack that term."""

    @pytest.mark.parametrize("token", CELLS)
    @pytest.mark.parametrize("variant", ["plain", "renormalised"])
    def test_expert(self, variant, token):
        lm, changed = toy(variant, L), 0
        intact, gates = np.asarray(lm(ROW))[0], Gates.ones(lm.config, ROW)
        for layer in range(L):
            for expert in range(E):
                got = np.asarray(lm(ROW, gates=gates.drop_expert(layer, expert, token)))[0]
                where = range(T) if token is None else [token]
                want = reference(lm, Edits(experts={(layer, t, expert) for t in where})).logits
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
                changed += np.abs(got - intact).max() > 1e-3
        ran = [layer.ids if token is None else layer.ids[token] for layer in reference(lm).layers]
        assert changed == sum(len(set(ids.ravel().tolist())) for ids in ran), "those that ran matter, the others do not"

    @pytest.mark.parametrize("token", CELLS)
    def test_head(self, token):
        lm = toy("clip-bias", L)
        intact, gates = np.asarray(lm(ROW))[0], Gates.ones(lm.config, ROW)
        for layer in range(L):
            for head in range(H):
                got = np.asarray(lm(ROW, gates=gates.drop_head(layer, head, token)))[0]
                where = range(T) if token is None else [token]
                want = reference(lm, Edits(heads={(layer, t, head) for t in where})).logits
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
                assert np.abs(got - intact).max() > 1e-3

    @pytest.mark.parametrize("layer", range(L + 1))
    def test_token(self, layer):
        lm = toy("plain", L)
        gates = Gates.ones(lm.config, ROW).drop_token(2, layer)
        got = np.asarray(lm(ROW, gates=gates))[0]
        np.testing.assert_allclose(got, reference(lm, Edits(tokens={(layer, 2)})).logits, rtol=1e-12, atol=1e-12)

    def test_several_at_once(self):
        lm = toy("plain", L)
        gates = Gates.ones(lm.config, ROW).drop_expert(1, 3).drop_head(0, 2, 5).drop_token(1)
        edits = Edits({(1, t, 3) for t in range(T)}, {(0, 5, 2)}, {(0, 1)})
        got = np.asarray(lm(ROW, gates=gates))[0]
        np.testing.assert_allclose(got, reference(lm, edits).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [AttnLRP(router="uniform"), CPLRP()], ids=repr)
def test_relevance_of_an_edited_pass(rule):
    """Gates given to ``explain`` hold during the pass: target, relevance and ledger are those of the edited model."""
    lm = toy("plain")
    interventions = Gates.ones(lm.config, ROW).drop_head(0, 2).drop_token(1)
    edits = Edits(set(), {(0, t, 2) for t in range(T)}, {(0, 1)})
    for layer in range(LAYERS):
        interventions = interventions.drop_expert(layer, 3)
        edits.experts |= {(layer, t, 3) for t in range(T)}
    ours = explain(lm, PROMPT, target=Token(11, 4), rule=rule, gates=interventions)
    want = reference(lm, edits).explain(4, {11: 1.0}, **options(rule))
    np.testing.assert_allclose(ours.ledger.target, [want.target], rtol=1e-12)
    np.testing.assert_allclose(ours.ledger.target, lm(ROW, gates=interventions)[0, 4, 11], rtol=1e-12)
    for got, wanted in ((ours.layers, want.layers), (ours.experts, want.experts), (ours.heads, want.heads)):
        np.testing.assert_allclose(got[0], wanted, rtol=1e-10, atol=1e-10)
    assert (ours.expert_ids == 3).any()
    assert not ours.experts[0][ours.expert_ids == 3].any()
    assert not ours.heads[0, 0, :, 2].any()
    assert ours.tokens[0, 1] == 0
    np.testing.assert_allclose(ours.ledger.residual, 0, atol=1e-12)
