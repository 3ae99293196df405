"""Experts as int8: what is computed is what the model of the rounded weights computes, in every respect."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import Cell, Gates, ablate, explain, export, load
from moejax.checkpoints.load import load_decoder
from moejax.checkpoints.plan import leaf_paths
from moejax.checkpoints.torch import TorchModel
from moejax.ops.int8 import Int8
from moejax.ops.packed import is_packed

from . import tiny
from .compare import same_leaves

PROMPT = [5, 80, 33, 96, 2, 33, 12]


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest of 255 equidistant values, the outermost of which is the largest of the row; in float64."""
    step = np.abs(values).max(-1, keepdims=True) / 127
    return np.where(step > 0, np.rint(values / np.where(step > 0, step, 1)) * step, 0)


@pytest.fixture(scope="module")
def full() -> moejax.LM:
    return load("tiny-olmoe", dtype="float32")


@pytest.fixture(scope="module")
def int8() -> moejax.LM:
    return load("tiny-olmoe", dtype="float32", experts="int8")


@pytest.fixture(scope="module")
def written(int8: moejax.LM, tmp_path_factory: pytest.TempPathFactory) -> moejax.LM:
    """The rounded model, exported and loaded again in full."""
    folder = tmp_path_factory.mktemp("int8") / "written"
    export(int8, folder, dequantise=True, progress=False)
    return load(folder)


@pytest.mark.fast
class TestFormat:
    def test_rounds_to_the_nearest_of_each_row(self) -> None:
        values = np.random.default_rng(0).normal(size=(3, 2, 5, 40)).astype(np.float32)
        values[1, 1, 2] = 0
        packed = Int8.of(jnp.asarray(values))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(packed)} == {"int8", "float32"}
        assert (packed.shape, packed.ndim, packed.row_scales.shape) == ((3, 2, 5, 40), 4, (3, 2, 5))
        assert np.abs(np.asarray(packed.codes, int)).max() == 127
        np.testing.assert_allclose(packed.unpack(jnp.float32), rounded(values.astype(np.float64)), rtol=1e-6)
        assert not np.asarray(packed.unpack(jnp.float32))[1, 1, 2].any()

    def test_is_indexed_and_made_positive_without_unpacking(self) -> None:
        packed = Int8.random(jax.random.key(0), (5, 8, 64))
        values = np.asarray(packed.unpack(jnp.float32))
        assert 0.017 < values.std() < 0.023
        np.testing.assert_array_equal(packed[jnp.array([3, 1])].unpack(jnp.float32), values[[3, 1]])
        np.testing.assert_array_equal(abs(packed).unpack(jnp.float32), np.abs(values))

    def test_a_row_that_is_not_finite_stays_so(self) -> None:
        values = jnp.ones((4, 3)).at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf)
        found = np.asarray(Int8.of(values).unpack(jnp.float32))
        assert np.isnan(found[1:3]).all()
        np.testing.assert_allclose(found[[0, 3]], 1, rtol=1e-6)

    def test_tiny_rows_are_not_too_large_for_their_codes(self) -> None:
        found = np.asarray(Int8.of(jnp.full((1, 2), 3e-45)).unpack(jnp.float32))
        assert np.abs(found).max() <= 1e-43


class TestLoading:
    def test_experts_alone_are_rounded(self, full: moejax.LM, int8: moejax.LM) -> None:
        for (path, want), (_, found) in zip(
            leaf_paths(full.decoder), leaf_paths(int8.decoder, is_leaf=is_packed), strict=True
        ):
            assert is_packed(found) == (".experts." in path), path
            if is_packed(found):
                np.testing.assert_allclose(found.unpack(jnp.float32), rounded(np.asarray(want, float)), rtol=1e-5)
            else:
                np.testing.assert_array_equal(found, want)
        assert full.decoder.num_parameters == int8.decoder.num_parameters

    def test_the_error_is_told(self, full: moejax.LM, int8: moejax.LM) -> None:
        assert full.quantisation is None
        assert int8.quantisation is not None
        for name, error in int8.quantisation.errors.items():
            kind = name.rpartition(".")[2]
            of = lambda lm, kind=kind: [getattr(layer.feed_forward.experts, kind) for layer in lm.decoder.layers]
            pairs = [(a.unpack(jnp.float32) - b, b) for a, b in zip(of(int8), of(full), strict=True)]
            squares = np.array([[float((x.astype(float) ** 2).sum()) for x in map(np.asarray, p)] for p in pairs])
            np.testing.assert_allclose(error, np.sqrt(np.divide(*squares.sum(0))), rtol=1e-3)
            assert 0.001 < error < 0.01
        assert set(int8.quantisation.errors) == {f"feed_forward.experts.{kind}" for kind in ("gate_up", "down")}
        assert "experts.down 0.6" in str(int8.quantisation)

    def test_a_converted_folder_and_a_model_in_memory_load_alike(self, int8: moejax.LM, tmp_path: Path) -> None:
        moejax.convert("tiny-olmoe", tmp_path / "orbax", progress=False)
        converted = load(tmp_path / "orbax", dtype="float32", experts="int8")
        assert same_leaves(converted.decoder, int8.decoder)
        assert converted.quantisation is not None
        assert int8.quantisation is not None
        assert converted.quantisation.errors == pytest.approx(int8.quantisation.errors)
        model = tiny.make("olmoe")
        errors: dict[str, float] = {}
        decoder = load_decoder(model.config.to_dict(), TorchModel(model), experts="int8", errors=errors)
        assert decoder.config.packed == "int8"
        assert len(errors) == 2

    def test_scales_do_not_depend_on_the_dtype_of_the_rest(self, int8: moejax.LM) -> None:
        half = load("tiny-olmoe", dtype="bfloat16", experts="int8")
        assert half.decoder.dtype == jnp.bfloat16
        ours, theirs = (lm.decoder.layers[1].feed_forward.experts for lm in (half, int8))
        assert same_leaves(ours, theirs)

    def test_what_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(moejax.ConfigError, match="'int4' is unknown; choose from"):
            load("tiny-olmoe", experts="int4")
        with pytest.raises(moejax.ConfigError, match="choose one of the two"):
            load("tiny-olmoe", experts="int8", keep_packed=True)
        with pytest.raises(moejax.ConfigError, match="olmoe is not published with MXFP4"):
            load("tiny-olmoe", experts="mxfp4")
        with pytest.raises(moejax.ConfigError, match="this llama has no experts that can be held as int8"):
            load(tiny.make("llama"), experts="int8")


class TestComputing:
    def test_is_what_the_rounded_model_computes(self, int8: moejax.LM, written: moejax.LM) -> None:
        assert not written.config.is_packed
        np.testing.assert_allclose(int8(PROMPT), written(PROMPT), rtol=1e-5, atol=1e-5)
        ours, theirs = (explain(lm, PROMPT) for lm in (int8, written))
        np.testing.assert_array_equal(ours.expert_ids, theirs.expert_ids)
        for name in ("tokens", "layers", "experts", "heads"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5, err_msg=name)
        options = {"max_new_tokens": 6}
        assert int8.generate_ids([PROMPT], **options) == written.generate_ids([PROMPT], **options)

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", ["gamma", "proportional", "cplrp", "plain"])
    def test_under_every_kind_of_rule(self, rule: str, int8: moejax.LM, written: moejax.LM) -> None:
        ours, theirs = (explain(lm, PROMPT, rule=rule) for lm in (int8, written))
        np.testing.assert_allclose(ours.layers, theirs.layers, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.ledger.residual / ours.ledger.target, 0, atol=1e-5)

    def test_the_ledger_closes(self, int8: moejax.LM) -> None:
        ledger = explain(int8, PROMPT).ledger
        assert np.abs(ledger.residual / ledger.target).max() <= 1e-5

    def test_relevance_is_close_to_that_of_the_full_model(self, full: moejax.LM, int8: moejax.LM) -> None:
        ours, theirs = (explain(lm, PROMPT) for lm in (int8, full))
        for name in ("tokens", "layers"):
            found, want = (np.ravel(getattr(relevance, name)) for relevance in (ours, theirs))
            assert np.corrcoef(found, want)[0, 1] > 0.999, name
        error = np.asarray(int8(PROMPT) - full(PROMPT))
        assert 1e-4 < np.sqrt((error**2).mean() / np.mean(np.asarray(full(PROMPT)) ** 2)) < 0.02

    def test_a_switched_off_expert_is_a_gate_at_zero(self, int8: moejax.LM, written: moejax.LM) -> None:
        relevance = explain(int8, PROMPT)
        expert = int(relevance.expert_ids[1, -1, 0])
        gates = Gates.ones(int8.config, PROMPT).drop_expert(layer=1, expert=expert)
        best = int(relevance.candidates[0][0].id)
        intact, changed = (np.asarray(int8(PROMPT, gates=g))[0, -1, best] for g in (None, gates))
        measured = ablate(int8, PROMPT, cells=[Cell.expert(1, expert)])
        np.testing.assert_allclose(measured[0, 0], intact - changed, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(int8(PROMPT, gates=gates), written(PROMPT, gates=gates), rtol=1e-5, atol=1e-5)


class TestExport:
    def test_is_refused_unless_it_is_asked_for(self, int8: moejax.LM, tmp_path: Path) -> None:
        with pytest.raises(moejax.ConfigError, match=r"dequantise=True\) writes") as caught:
            export(int8, tmp_path / "refused")
        assert len(str(caught.value).splitlines()) == 1
        assert not list(tmp_path.iterdir())

    def test_writes_the_values(self, int8: moejax.LM, written: moejax.LM) -> None:
        for (path, want), (_, found) in zip(
            leaf_paths(int8.decoder, is_leaf=is_packed), leaf_paths(written.decoder), strict=True
        ):
            values = want.unpack(jnp.float32) if is_packed(want) else want
            np.testing.assert_array_equal(found, values, err_msg=path)
