"""Gates as interventions: what they broadcast to, how they combine, and that a wrong index is an error."""

from dataclasses import fields

import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, ROW, E, H, K, T, variant_lm

from moejax import Gates

L = 2
TOKENS = jnp.asarray([PROMPT, [1, 2, 3, 4, 5, 6, 7], [9, 9, 9, 8, 8, 8, 7]])
B = len(TOKENS)

SHAPES = {"tokens": (L + 1, B, T), "experts": (L, B, T, E), "heads": (L, B, T, H)}


@pytest.fixture(scope="module")
def lm():
    return variant_lm("clip-bias")


@pytest.fixture
def ones(lm) -> Gates:
    return Gates.ones(lm.config, TOKENS)


def random_gates(kept: str) -> Gates:
    """Gates of random numbers, of size 1 along every axis but the last and those named."""
    rng = np.random.default_rng(0)
    shapes = {
        name: tuple(n if i == len(shape) - 1 or "LBT"[i] in kept else 1 for i, n in enumerate(shape))
        for name, shape in SHAPES.items()
    }
    return Gates(**{name: jnp.asarray(rng.uniform(0, 2, shape), jnp.float32) for name, shape in shapes.items()})


def spread(gates: Gates) -> Gates:
    return Gates(**{name: jnp.broadcast_to(getattr(gates, name), shape) for name, shape in SHAPES.items()})


def test_ones_change_nothing(lm, ones):
    present = {f.name: gate.shape for f in fields(ones) if (gate := getattr(ones, f.name)) is not None}
    assert present == SHAPES
    np.testing.assert_allclose(lm(TOKENS, gates=ones), lm(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["", "L", "B", "T"])
def test_axes_of_size_one_broadcast(lm, kept):
    gates = random_gates(kept)
    got, intact = lm(TOKENS, gates=gates), lm(TOKENS)
    np.testing.assert_allclose(got, lm(TOKENS, gates=spread(gates)), rtol=1e-4, atol=1e-5)
    assert np.abs(got - intact).max() > 0.1


def test_rows_and_positions_are_their_own(lm, ones):
    """A knob on one row's fourth token leaves the other rows, and the tokens before it, as they were."""
    gates = Gates(heads=ones.heads.at[:, 1, 4].set(0.0))
    got, intact = np.asarray(lm(TOKENS, gates=gates)), np.asarray(lm(TOKENS, gates=Gates(heads=ones.heads)))
    changed = np.abs(got - intact).max(-1) > 1e-6
    assert changed[1, 4:].all()
    assert not changed[[0, 2]].any()
    assert not changed[1, :4].any()


def test_one_row_without_batch_axis(lm):
    gates = Gates.ones(lm.config, jnp.asarray(PROMPT))
    assert gates.experts.shape == (L, 1, T, E)


class TestSetting:
    def test_drop_expert(self, ones):
        for token, where in [(None, slice(None)), (4, 4), (-1, T - 1)]:
            want = np.ones(SHAPES["experts"])
            want[1, :, where, 3] = 0
            np.testing.assert_array_equal(ones.drop_expert(1, 3, token).experts, want)

    def test_drop_head(self, ones):
        want = np.ones(SHAPES["heads"])
        want[0, :, 2, 1] = 0.5
        np.testing.assert_array_equal(ones.drop_head(0, 1, 2, value=0.5).heads, want)

    def test_drop_token(self, ones):
        want = np.ones(SHAPES["tokens"])
        want[L, :, 2] = 0
        np.testing.assert_array_equal(ones.drop_token(2, layer=L).tokens, want)
        want = np.ones(SHAPES["tokens"])
        want[0, :, 2] = 0
        np.testing.assert_array_equal(ones.drop_token(2).tokens, want, err_msg="the embedding by default")

    def test_returns_new_gates_and_accumulates(self, ones):
        both = ones.drop_expert(0, 1).drop_expert(1, 2).drop_head(0, 0)
        assert (np.asarray(ones.experts) == 1).all()
        assert not np.asarray(both.experts)[0, :, :, 1].any()
        assert not np.asarray(both.experts)[1, :, :, 2].any()
        assert not np.asarray(both.heads)[0, :, :, 0].any()
        np.testing.assert_array_equal(both.tokens, ones.tokens)

    @pytest.mark.parametrize(
        ("method", "arguments", "message"),
        [
            ("drop_expert", (L, 0), "layer 2 is out of range: there are 2"),
            ("drop_expert", (-L - 1, 0), "layer -3 is out of range: there are 2"),
            ("drop_expert", (0, E), "expert 6 is out of range: there are 6"),
            ("drop_expert", (0, -E - 1), "expert -7"),
            ("drop_expert", (0, 0, T), "token 7 is out of range: there are 7"),
            ("drop_head", (0, H), "head 4 is out of range: there are 4"),
            ("drop_head", (L, 0), "layer 2"),
            ("drop_head", (0, 0, -T - 1), "token -8"),
            ("drop_token", (T,), "token 7"),
            ("drop_token", (0, L + 1), "layer 3 is out of range: there are 3"),
        ],
    )
    def test_index_out_of_range(self, ones, method, arguments, message):
        with pytest.raises(IndexError, match=message):
            getattr(ones, method)(*arguments)

    @pytest.mark.parametrize(("method", "field"), [("drop_expert", "experts"), ("drop_head", "heads")])
    def test_field_that_is_not_there(self, method, field):
        with pytest.raises(ValueError, match=f"no '{field}'; start from Gates.ones"):
            getattr(Gates(), method)(0, 0)


class TestCombining:
    def test_times_multiplies_field_by_field(self, lm, ones):
        readout = Gates.readout(lm.config, TOKENS)
        assert readout.experts is None
        assert readout.slots.shape == (L, B, T, K)
        interventions = random_gates("L")
        both = readout.times(interventions)
        np.testing.assert_array_equal(both.tokens, readout.tokens * interventions.tokens)
        np.testing.assert_array_equal(both.experts, interventions.experts)
        np.testing.assert_array_equal(both.slots, readout.slots)
        assert readout.times(None) is readout
        np.testing.assert_array_equal(readout.times(Gates()).heads, readout.heads)
        np.testing.assert_array_equal(Gates().times(ones).experts, ones.experts)

    def test_slot_gate_is_the_expert_gate_where_routed(self, lm):
        """Switching a slot off equals switching off the expert that it was routed to."""
        from moejax import explain

        single = ROW
        ids = explain(lm, PROMPT).expert_ids
        slots = jnp.ones((L, 1, T, K)).at[1, 0, 3, 1].set(0.0)
        dropped = Gates.ones(lm.config, single).drop_expert(1, int(ids[1, 3, 1]), token=3)
        np.testing.assert_allclose(lm(ROW, gates=Gates(slots=slots)), lm(ROW, gates=dropped), rtol=1e-4, atol=1e-5)
