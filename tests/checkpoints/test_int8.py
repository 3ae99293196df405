"""Experts as int8: what is computed is what the model of the rounded weights computes, in every respect."""

from pathlib import Path
from typing import NamedTuple

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


class Models(NamedTuple):
    """A model in full, the same with int8 experts, and that one exported in full and loaded again; in float32."""

    full: moejax.LM
    int8: moejax.LM
    written: moejax.LM


@pytest.fixture(scope="module", params=["random", pytest.param("tiny-olmoe", marks=pytest.mark.slow)])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A trained model shows what rounding does to results, a random one computes the same in less time."""
    folder = tmp_path_factory.mktemp("int8")
    source = request.param
    if source == "random":
        source = folder / "random"
        tiny.make("olmoe", num_hidden_layers=2).save_pretrained(source)
    int8 = load(source, dtype="float32", experts="int8")
    export(int8, folder / "written", dequantise=True, progress=False)
    return Models(load(source, dtype="float32"), int8, load(folder / "written"))


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
    def test_experts_alone_are_rounded(self, models: Models) -> None:
        pairs = zip(leaf_paths(models.full.decoder), leaf_paths(models.int8.decoder, is_leaf=is_packed), strict=True)
        for (path, want), (_, found) in pairs:
            assert is_packed(found) == (".experts." in path), path
            if is_packed(found):
                # of values in the middle between two codes, float32 may take the other one
                step = np.abs(np.asarray(want)).max(-1, keepdims=True) / 127
                assert (np.abs(found.unpack(jnp.float32) - want) <= 0.50001 * step).all()
            else:
                np.testing.assert_array_equal(found, want)
        assert models.full.decoder.num_parameters == models.int8.decoder.num_parameters

    def test_the_error_is_told(self, models: Models) -> None:
        assert models.full.quantisation is None
        assert models.int8.quantisation is not None
        for name, error in models.int8.quantisation.errors.items():
            kind = name.rpartition(".")[2]
            pairs = []
            for held, layer in zip(models.int8.decoder.layers, models.full.decoder.layers, strict=True):
                want = getattr(layer.feed_forward.experts, kind)
                pairs.append((getattr(held.feed_forward.experts, kind).unpack(jnp.float32) - want, want))
            squares = np.array([[float((np.asarray(x, float) ** 2).sum()) for x in pair] for pair in pairs])
            np.testing.assert_allclose(error, np.sqrt(np.divide(*squares.sum(0))), rtol=1e-3)
            assert 0.001 < error < 0.01
        assert set(models.int8.quantisation.errors) == {f"feed_forward.experts.{kind}" for kind in ("gate_up", "down")}
        assert "relative rms error of their weights: experts." in str(models.int8.quantisation)

    def test_a_model_in_memory_loads_alike(self, models: Models) -> None:
        model = tiny.make("olmoe", num_hidden_layers=2)
        errors: dict[str, float] = {}
        decoder = load_decoder(model.config.to_dict(), TorchModel(model), experts="int8", errors=errors)
        assert decoder.config.packed == "int8"
        assert len(errors) == 2

    @pytest.mark.slow
    def test_a_converted_folder_loads_alike(self, tmp_path: Path) -> None:
        moejax.convert("tiny-olmoe", tmp_path / "orbax", progress=False)
        converted, direct = (load(m, dtype="float32", experts="int8") for m in (tmp_path / "orbax", "tiny-olmoe"))
        assert same_leaves(converted.decoder, direct.decoder)
        assert converted.quantisation is not None
        assert direct.quantisation is not None
        assert converted.quantisation.errors == pytest.approx(direct.quantisation.errors)

    def test_scales_do_not_depend_on_the_dtype_of_the_rest(self) -> None:
        half, full = (load("tiny-olmoe", dtype=dtype, experts="int8").decoder for dtype in ("bfloat16", "float32"))
        assert half.dtype == jnp.bfloat16
        assert same_leaves(half.layers[1].feed_forward.experts, full.layers[1].feed_forward.experts)

    def test_what_cannot_be(self) -> None:
        with pytest.raises(moejax.ConfigError, match="'int4' is unknown; choose from"):
            load("tiny-olmoe", experts="int4")
        with pytest.raises(moejax.ConfigError, match="choose one of the two"):
            load("tiny-olmoe", experts="int8", keep_packed=True)
        with pytest.raises(moejax.ConfigError, match="olmoe is not published with MXFP4"):
            load("tiny-olmoe", experts="mxfp4")
        with pytest.raises(moejax.ConfigError, match="this llama has no experts that can be held as int8"):
            load(tiny.make("llama"), experts="int8")


class TestComputing:
    def test_is_what_the_rounded_model_computes(self, models: Models) -> None:
        """Logits and relevance; the ledger closes, and relevance is close to that of the model in full."""
        assert not models.written.config.is_packed
        np.testing.assert_allclose(models.int8(PROMPT), models.written(PROMPT), rtol=1e-5, atol=1e-5)
        full, ours, theirs = (explain(lm, PROMPT) for lm in models)
        np.testing.assert_array_equal(ours.expert_ids, theirs.expert_ids)
        for name in ("tokens", "layers", "experts", "heads"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(ours.ledger.residual / ours.ledger.target).max() <= 1e-5
        for name in ("tokens", "layers"):
            found, want = (np.ravel(getattr(relevance, name)) for relevance in (ours, full))
            assert np.corrcoef(found, want)[0, 1] > 0.999, name
        error, logits = np.asarray(models.int8(PROMPT) - models.full(PROMPT)), np.asarray(models.full(PROMPT))
        assert 1e-5 < np.sqrt((error**2).mean() / (logits**2).mean()) < 0.02

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", ["gamma", "proportional", "cplrp", "plain"])
    def test_under_every_kind_of_rule(self, rule: str, models: Models) -> None:
        ours, theirs = (explain(lm, PROMPT, rule=rule) for lm in models[1:])
        np.testing.assert_allclose(ours.layers, theirs.layers, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.ledger.residual / ours.ledger.target, 0, atol=1e-5)

    @pytest.mark.slow
    def test_generates_the_same(self, models: Models) -> None:
        new = [lm.generate_ids([PROMPT], max_new_tokens=6) for lm in models[1:]]
        assert new[0] == new[1]

    @pytest.mark.slow
    def test_a_switched_off_expert_is_a_gate_at_zero(self, models: Models) -> None:
        int8 = models.int8
        relevance = explain(int8, PROMPT)
        expert = int(relevance.expert_ids[1, -1, 0])
        gates = Gates.ones(int8.config, PROMPT).drop_expert(layer=1, expert=expert)
        best = int(relevance.candidates[0][0].id)
        intact, changed = (np.asarray(int8(PROMPT, gates=g))[0, -1, best] for g in (None, gates))
        measured = ablate(int8, PROMPT, cells=[Cell.expert(1, expert)])
        np.testing.assert_allclose(measured[0, 0], intact - changed, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(int8(PROMPT, gates=gates), models.written(PROMPT, gates=gates), rtol=1e-5, atol=1e-5)


class TestExport:
    def test_is_refused_unless_it_is_asked_for(self, models: Models, tmp_path: Path) -> None:
        with pytest.raises(moejax.ConfigError, match=r"dequantise=True\) writes") as caught:
            export(models.int8, tmp_path / "refused")
        assert len(str(caught.value).splitlines()) == 1
        assert not list(tmp_path.iterdir())

    def test_writes_the_values(self, models: Models) -> None:
        pairs = zip(leaf_paths(models.int8.decoder, is_leaf=is_packed), leaf_paths(models.written.decoder), strict=True)
        for (path, want), (_, found) in pairs:
            values = want.unpack(jnp.float32) if is_packed(want) else want
            np.testing.assert_array_equal(found, values, err_msg=path)
