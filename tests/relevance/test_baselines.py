"""Other methods' scores against their definitions, written out in numpy or read in another way."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, ROW, C, D, E, H, K, T, V, make_lm, mixture_lm, variant_lm

from moejax import LM, Argmax, Contrast, Gates, LogProbability, MoejaxError, RouterChoice, Span, explain
from moejax.relevance import (
    BASELINES,
    Direct,
    activation_norm,
    direct_logit_attribution,
    frequency,
    integrated_gradients,
    reap,
    rollout,
    router_weight,
)
from moejax.relevance.baselines import observed
from moejax.relevance.baselines.path_integrals import _by_slot
from moejax.relevance.engine import Readout, Slots
from moejax.rules import Plain
from relevance.reference import Affine, Reference, wide

LAYERS = 2
AT = 5
AIM = Contrast(11, 60, AT)
EXACT = {"rtol": 1e-10, "atol": 1e-11}

pytestmark = pytest.mark.usefixtures("x64")


def toy(variant: str = "plain", layers: int = LAYERS) -> LM:
    return variant_lm(variant, dtype="float64", layers=layers)


@cache
def reference() -> Reference:
    with jax.enable_x64(True):
        lm = toy()
        return Reference(lm.decoder, PROMPT, lm.config.blocks[0].rotary.rope.angles(jnp.arange(T)[None], C))


class TestIntegratedGradients:
    @pytest.mark.slow
    def test_embeddings_equal_relevance_along_the_path(self):
        """Gradient times input at a scaled embedding is the scale times the path's slope."""
        lm, steps = toy(), 3
        got = integrated_gradients(lm, PROMPT, target=AIM, steps=steps, chunk=2)
        slopes = []
        for scale in (np.arange(steps) + 0.5) / steps:
            gates = Gates(tokens=jnp.ones((LAYERS + 1, 1, T)).at[0].set(scale))
            slopes.append(explain(lm, PROMPT, target=AIM, rule=Plain(), gates=gates).tokens / scale)
        np.testing.assert_allclose(got.tokens, np.mean(slopes, 0), rtol=1e-9, atol=1e-10)
        assert got.unit == "the target's"
        assert got.labels == ["'w11' - 'w60'"]

    def test_complete(self):
        """From the mean embedding, whose norm is far from zero; one layer of experts that do not change on the way."""
        lm, target = make_lm(0, "float64", layers=1, sizes=(D, 20, K, K, H, 2, C)), LogProbability(11, AT)
        start = lm.decoder.embedding.mean(0)
        coarse, fine = (
            integrated_gradients(lm, PROMPT, target=target, steps=n, baseline=start, chunk=5) for n in (5, 100)
        )
        assert abs(fine.gap[0]) < 0.02 * abs(coarse.gap[0])
        z = np.asarray(jax.nn.log_softmax(lm(ROW)))[0, AT]
        end = lm.decoder.hidden(ROW, embedded=jnp.broadcast_to(start, (1, T, D))).stream
        z0 = np.asarray(jax.nn.log_softmax(lm.decoder.logits(end)))[0, AT]
        np.testing.assert_allclose(fine.tokens.sum() + fine.gap, [(z - z0)[11]], rtol=1e-10)
        assert abs((z - z0)[11]) > 0.1

    @pytest.mark.parametrize("over", [pytest.param("gates", marks=pytest.mark.slow), "heads"])
    def test_gates_complete(self, over):
        """Experts of a single layer are routed to alike all along the path: no score is of another."""
        lm = toy(layers=1)
        got = integrated_gradients(lm, PROMPT, target=AIM, steps=20, over=over)
        ones = Gates.ones(lm.config, ROW)
        off = Gates(experts=0 * ones.experts) if over == "gates" else Gates(heads=0 * ones.heads)
        gone = np.asarray(lm(ROW) - lm(ROW, gates=off))[0, AT]
        scores = got.experts if over == "gates" else got.heads
        np.testing.assert_allclose(scores.sum() + got.gap, [gone[11] - gone[60]], rtol=1e-10)
        if over == "gates":
            assert got.experts.shape == (1, 1, T, K)
            assert abs(got.gap[0]) < 1e-2 * abs(gone[11] - gone[60])
            np.testing.assert_array_equal(got.expert_ids, explain(lm, PROMPT, target=AIM).expert_ids)
        else:
            assert got.heads.shape == (1, 1, T, H)
            assert got.feed_forward is None

    @pytest.mark.slow
    def test_every_kind_of_expert(self):
        lm = mixture_lm()
        got = integrated_gradients(lm, PROMPT, target=AIM, steps=2, over="gates")
        assert got.feed_forward.slots.shape == got.attention.slots.shape == (1, LAYERS, T, K)
        assert got.shared.shape == (1, LAYERS, T, 1)
        assert got.attention.slots.any()
        assert got.shared[:, 0].any()
        assert not got.feed_forward.slots[:, 1].any(), "a dense layer"

    def test_errors(self):
        for options, message in (
            ({"over": "neurons"}, "over='neurons' is unknown; choose from embeddings, gates, heads"),
            ({"steps": 0}, "steps=0 must be positive"),
            ({"over": "gates", "baseline": np.zeros(D)}, "a baseline is for embeddings only"),
            ({"baseline": np.zeros(D - 1)}, r"a baseline of shape \[39\] for embeddings of shape \[7, 40\]"),
        ):
            with pytest.raises(MoejaxError, match=message):
                integrated_gradients(toy(), PROMPT, **options)


def test_rollout():
    got = rollout(toy(), PROMPT, target=AIM)
    rows = np.eye(T)
    for layer in reference().layers:
        pattern = np.zeros((H, T, T))
        for h, t in np.ndindex(H, T):
            pattern[h, t, : t + 1] = layer._cell(t, h)[1]
        rows = (pattern.mean(0) + np.eye(T)) / 2 @ rows
    np.testing.assert_allclose(got.tokens, rows[[AT]], **EXACT)
    np.testing.assert_allclose(got.tokens.sum(), 1)
    assert not got.tokens[:, AT + 1 :].any()
    with pytest.raises(AttributeError, match="attention rollout has no scores of experts"):
        _ = got.experts


class TestDirect:
    def test_equals_products_with_the_head(self):
        lm, want = toy(), reference()
        got = direct_logit_attribution(lm, PROMPT, target=AIM)
        scale = wide(lm.decoder.norm.weight) / np.sqrt((want.stream[AT] ** 2).mean() + lm.decoder.norm.eps)
        direction = (want.head[11] - want.head[60]) * scale
        for layer, ours in zip(want.layers, got.experts[0], strict=True):
            np.testing.assert_allclose(ours[AT], layer.terms[AT] @ direction, **EXACT)
            assert not np.delete(ours, AT, 0).any()
        for layer, ours in zip(want.layers, got.heads[0], strict=True):
            output = Affine.of(layer.block.attention.output).weight.reshape(D, H, C)
            np.testing.assert_allclose(ours[AT], np.einsum("hc,dhc,d->h", layer.heads[AT], output, direction), **EXACT)
        np.testing.assert_allclose(got.tokens[0, AT], want.layers[0].x[AT] @ direction, **EXACT)
        np.testing.assert_allclose(got.gap, 0, atol=1e-11)
        lens = explain(lm, PROMPT, target=AIM, rule=Direct()).layers[0, :, AT]
        np.testing.assert_allclose(
            lens, [*(layer.x[AT] @ direction for layer in want.layers), want.stream[AT] @ direction]
        )

    def test_ledger_closes(self):
        """Of all that a model may have: biases and clamps; attention experts, a shared expert, a dense layer."""
        for lm in (toy("clip-bias"), mixture_lm()):
            books = explain(lm, PROMPT, target=AIM, rule=Direct()).ledger
            np.testing.assert_allclose(books.residual, 0, atol=1e-11)
            assert set(books.leaks) == {"softmax", "activation", "bias"}
        # attention experts are their heads over again, and the gap is biases and the dense layer
        got = direct_logit_attribution(mixture_lm(), PROMPT, target=AIM)
        np.testing.assert_allclose(got.heads.sum(-1), got.attention.slots.sum(-1), **EXACT)
        parts = [got.tokens, got.feed_forward.slots, got.attention.slots, got.shared]
        value = direct_logit_attribution(mixture_lm(), PROMPT, target=AIM).gap + sum(p.sum() for p in parts)
        z = np.asarray(mixture_lm()(ROW))[0, AT]
        np.testing.assert_allclose(value, [z[11] - z[60]], rtol=1e-10)


class TestObserved:
    """Of the routing and the outputs alone, whatever the target."""

    def test_against_numpy(self):
        want, ids = reference(), np.stack([layer.ids for layer in reference().layers])
        norms = np.stack([np.linalg.norm(layer.terms, axis=-1) for layer in want.layers])
        weights = np.stack([layer.weights for layer in want.layers])
        counts = np.stack([np.bincount(row.ravel(), minlength=E) for row in ids])
        share = np.stack([row[at] / T for row, at in zip(counts, ids, strict=True)])
        wants = {reap: norms, activation_norm: norms / weights, router_weight: weights, frequency: share}
        for method, scores in wants.items():
            got = method(toy(), PROMPT, target=AIM)
            np.testing.assert_array_equal(got.expert_ids, ids)
            np.testing.assert_allclose(got.experts, scores[None], rtol=1e-6, err_msg=got.method)
            assert got.gap is None
        saliency = np.zeros((LAYERS, E))
        np.add.at(saliency, (np.arange(LAYERS)[:, None, None], ids), norms)
        got = reap(toy(), PROMPT, target=AIM)
        np.testing.assert_allclose(got.by_expert("mean")[0], saliency / counts.clip(1), rtol=1e-6)
        by_expert = frequency(toy(), PROMPT, target=AIM).by_expert("mean")
        np.testing.assert_allclose(by_expert[0], counts / T, rtol=1e-6)

    def test_slots_that_share_an_expert_or_select_none(self, monkeypatch):
        """Of TC-MoE, say, whose weights have signs too."""
        ids, weights = np.array([[[2, 2, 0], [1, 2, 0]]]), np.array([[[0.4, -0.1, 0.0], [0.5, -0.2, 0.3]]])
        slots = Slots(ids[:, None], weights[:, None])
        gates = Gates(slots=np.abs(weights)[None, :, None] * 10)
        out = Readout(gates, {}, {}, np.zeros((1, 1)), np.zeros((1, 1, 1), int), np.zeros((1, 1, V)), slots, None)
        monkeypatch.setattr(observed, "read_activations", lambda *_, **__: out)
        wants = {frequency: [[[1, 1, 0], [0.5, 1, 0.5]]], activation_norm: [[[10, 10, 0], [10, 10, 10]]]}
        for method, want in wants.items():
            found = method(toy(), PROMPT[:2], target=Argmax())
            np.testing.assert_allclose(found.experts[0], want, rtol=1e-12, err_msg=found.method)
        scores = np.arange(1.0, 1 + 2 * E).reshape(1, 1, 2, E)
        by_slot = _by_slot(scores, slots, E)
        np.testing.assert_array_equal(by_slot.slots, [[[[3, 0, 1], [E + 2, E + 3, E + 1]]]])

    def test_other_mixtures_and_targets(self):
        """A target that the last layers do not take part in changes nothing."""
        lm = mixture_lm()
        got = reap(lm, PROMPT, target=RouterChoice(0, 2, versus=4, position=3))
        want = reap(lm, PROMPT, target=AIM)
        for ours, other in ((got.feed_forward, want.feed_forward), (got.attention, want.attention)):
            np.testing.assert_allclose(ours.slots, other.slots, **EXACT)
        assert (got.attention.slots > 0).all()
        assert (got.feed_forward.slots[:, 0] > 0).all()
        assert not got.feed_forward.slots[:, 1].any()
        assert got.labels == ["layer 0: expert 2 - expert 4"]


@pytest.mark.parametrize("name", BASELINES)
def test_one_call_form(name):
    lm = toy(layers=1)
    options = {"steps": 2} if name.startswith("integrated") else {}
    got = BASELINES[name](lm, PROMPT[:5], target=Span([3, 1, 4]), **options)
    assert got.token_ids.tolist() == [*PROMPT[:5], 3, 1]
    assert "".join(got.pieces) == " ".join(f"w{i}" for i in got.token_ids)
    assert got.labels == ["log p('w3') + log p('w1') + log p('w4')"]
    assert got.positions.tolist() == [6]
    assert got.method
    assert got.unit
    for scores, shape in ((got.tokens, (1, T)), (got.heads, (1, 1, T, H))):
        assert scores is None or scores.shape == shape
    assert got.feed_forward is None or got.experts.shape == (1, 1, T, K)
    assert not (got.tokens is None and got.feed_forward is None)


@pytest.mark.parametrize("name", BASELINES)
def test_float16_is_refused(name):
    with pytest.raises(MoejaxError, match="float16 overflows and underflows"):
        BASELINES[name](make_lm(dtype="float16", layers=1), PROMPT)
