"""Prompts of many lengths share few programs, and padding changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny.decoders import PROMPT, L, T, make_lm

from moejax import LM, Cell, Gates, Token, ablate, baselines, explain
from moejax.generation import decode
from moejax.models.padding import bucket_length
from moejax.relevance import explain_batch, question
from moejax.relevance.ablate import _values
from moejax.relevance.baselines.path_integrals import _slopes
from moejax.relevance.engine import relevance
from moejax.rules import AttnLRP

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
AIM = Token(11)


@pytest.fixture(scope="module")
def lm() -> LM:
    return make_lm()


@given(st.integers(1, 100_000))
def test_a_quarter_at_most_and_four_to_a_doubling(length):
    found = bucket_length(length)
    assert bucket_length(found) == found
    assert length <= found
    if length > 64:
        assert found < 1.25 * length
        assert len({bucket_length(n) for n in range(length, 2 * length, max(1, length // 64))}) <= 5
    else:
        assert found in (16, 32, 64)
    assert {n: bucket_length(n) for n in (512, 4096)} == {512: 512, 4096: 4096}, "what is measured is not padded"


def unpadded(lm: LM, ids: list[int], target=AIM, gates: Gates | None = None, **options):
    """What the engine reads of just these tokens."""
    ids, aims = target.resolve(lm, ids)
    seeds = target.seeds([aims], lm.decoder.accumulation_dtype)
    tokens = jnp.asarray([ids], jnp.int32)
    return relevance(lm.flat, tokens, None, seeds, gates or Gates(), rule=AttnLRP(), **options)


class TestExplain:
    @pytest.mark.parametrize("length", [3, T])
    def test_equals_the_tokens_alone(self, lm, length):
        nodes = ("edges.1", "neurons.0", f"stream.{L}")
        got, want = explain(lm, PROMPT[:length], target=AIM, nodes=nodes), unpadded(lm, PROMPT[:length], nodes=nodes)
        np.testing.assert_allclose(got.layers, want.gates.tokens[:, :, 0], **CLOSE)
        np.testing.assert_allclose(got.heads, want.gates.heads[:, :, 0], **CLOSE)
        np.testing.assert_allclose(got.experts, want.gates.slots[:, :, 0], **CLOSE)
        np.testing.assert_array_equal(got.expert_ids, want.routes.ids[:, 0])
        for node in nodes:
            assert got.vectors[node].shape == want.vectors[node][:, 0].shape
            np.testing.assert_allclose(got.vectors[node], want.vectors[node][:, 0], **CLOSE, err_msg=node)
        assert abs(got.ledger.residual[0]) <= 1e-5 * abs(got.ledger.target[0])

    def test_lengths_share_a_program(self, lm):
        explain(lm, PROMPT, target=AIM)
        before = relevance.jitted._cache_size()
        for length in (2, 4, 6):
            explain(lm, PROMPT[:length], target=AIM)
        explain_batch(lm, [PROMPT[:3]], target=AIM)
        assert relevance.jitted._cache_size() == before

    def test_gates_for_single_tokens_fit_the_prompt(self, lm):
        gates = Gates.ones(lm.config, PROMPT).drop_head(1, 2, token=3)
        got, want = explain(lm, PROMPT, target=AIM, gates=gates), unpadded(lm, PROMPT, gates=gates)
        np.testing.assert_allclose(got.layers, want.gates.tokens[:, :, 0], **CLOSE)

    def test_gates_of_a_batch_count_from_the_beginning(self, lm):
        gates = Gates.ones(lm.config, PROMPT).drop_head(1, 2, token=1)
        short, _ = explain_batch(lm, [PROMPT[:4], PROMPT], target=AIM, gates=gates)
        alone = explain(lm, PROMPT[:4], target=AIM, gates=Gates.ones(lm.config, PROMPT[:4]).drop_head(1, 2, token=1))
        np.testing.assert_allclose(short.layers, alone.layers, **CLOSE)


def test_interventions(lm):
    cells = [Cell.head(1, 2), Cell.head(1, 2, token=1), Cell.token(-1)]
    values = [unpadded(lm, PROMPT, gates=g).target[0, 0] for g in (
        Gates(),
        Gates.ones(lm.config, PROMPT).drop_head(1, 2),
        Gates.ones(lm.config, PROMPT).drop_head(1, 2, token=1),
        Gates.ones(lm.config, PROMPT).drop_token(T - 1),
    )]  # fmt: skip
    got = ablate(lm, PROMPT, cells=cells, target=AIM)
    np.testing.assert_allclose(got[:, 0], values[0] - np.array(values[1:]), rtol=1e-4, atol=1e-5)
    before = _values.jitted._cache_size()
    ablate(lm, PROMPT[:5], cells=cells, target=AIM)
    assert _values.jitted._cache_size() == before
    with pytest.raises(IndexError, match="token 7 is out of range: there are 7"):
        ablate(lm, PROMPT, cells=[Cell.token(T)], target=AIM)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("integrated-gates", "rollout") else pytest.mark.slow)
        for name in sorted(baselines.BASELINES)
    ],
)
def test_baselines(lm, monkeypatch, name):
    """Each finds of the tokens alone what it finds of padded ones, for which there is a program already."""
    method = baselines.BASELINES[name]
    method(lm, PROMPT[:3], target=AIM)
    before = relevance.jitted._cache_size() + _slopes.jitted._cache_size()
    got = method(lm, PROMPT, target=AIM)
    assert relevance.jitted._cache_size() + _slopes.jitted._cache_size() == before
    monkeypatch.setattr(question, "padded_length", lambda config, length, gates: length)
    want = method(lm, PROMPT, target=AIM)
    assert (got.method, got.labels, got.pieces) == (want.method, want.labels, want.pieces)
    for part in ("tokens", "heads", "shared", "gap"):
        ours, theirs = getattr(got, part), getattr(want, part)
        assert (ours is None) == (theirs is None), part
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, **CLOSE, err_msg=part)
    if got.feed_forward is not None:
        np.testing.assert_array_equal(got.feed_forward.ids, want.feed_forward.ids)
        np.testing.assert_allclose(got.feed_forward.slots, want.feed_forward.slots, **CLOSE)


@pytest.mark.slow
def test_generation(lm):
    def greedily(ids: list[int]) -> list[int]:
        for _ in range(4):
            ids = [*ids, int(jnp.argmax(lm.decoder(jnp.asarray([ids]))[0, -1]))]
        return ids[-4:]

    assert lm.generate_ids([PROMPT], max_new_tokens=4) == [greedily(PROMPT)]
    before = decode._generate.jitted._cache_size()
    assert lm.generate_ids([PROMPT[:3]], max_new_tokens=4) == [greedily(PROMPT[:3])]
    assert decode._generate.jitted._cache_size() == before
