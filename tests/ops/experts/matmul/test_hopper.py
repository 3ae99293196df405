"""The kernel for Hopper GPUs, run by Pallas's interpreter, against numpy; what it is given, and when it is taken.

On a GPU ``scripts/check_kernels.py`` compares it at true sizes.
"""

from importlib import import_module
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu
from slots import LOADS, rows_of

from moejax.ops.experts import assign
from moejax.ops.experts.matmul import hopper
from moejax.ops.experts.matmul.tile_table import tile_table
from moejax.ops.mxfp4 import MXFP4

E, D, M, N = 4, 256, 192, 3

transposed_only = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="the interpreter of jax 0.10 has no transposed operands"
)
BOTH_WAYS = [pytest.param(True, id="times-matrix"), pytest.param(False, id="times-transposed", marks=transposed_only)]


def interpreter():
    # reads beyond the last row are filled in by the copying unit, and never stored
    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        return mosaic_gpu.InterpretGPUParams(out_of_bounds_reads="uninitialized")
    # where jax 0.10 has it
    params = import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return params.InterpretGPUParams(out_of_bounds_reads="uninitialized")


@pytest.fixture(params=[pytest.param(64, marks=pytest.mark.slow), 128], ids=["one-line", "two-lines"])
def small_tiles(monkeypatch, request):
    """Tiles of 16 rows and 64 columns on two processors, so that few rows fill several tiles."""
    monkeypatch.setattr(hopper, "tiling", lambda *_: hopper.HopperTiling(16, 64, request.param, 2, 2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("transpose", BOTH_WAYS)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_against_numpy(load, transpose):
    first, rows = rows_of(load)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, D)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(E, D, M) if transpose else (E, M, D)), jnp.bfloat16)
    y = hopper.matmul(x, weight, jnp.asarray(first), jnp.asarray(load, jnp.int32), transpose, interpreter())
    assert y.shape == (rows, M)
    for e, (start, count) in enumerate(zip(first, load, strict=True)):
        matrix = np.asarray(weight[e], np.float64)
        want = np.asarray(x[start : start + count], np.float64) @ (matrix if transpose else matrix.T)
        got = np.asarray(y[start : start + count], np.float64)
        np.testing.assert_allclose(got, want, rtol=0.01, atol=0.1)


@pytest.mark.usefixtures("small_tiles")
def test_cotangents_share_the_weights():
    """A batch of rows is one product, in which a row's copies stand together."""
    load = LOADS["uneven"]
    first, rows = rows_of(load)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, rows, D)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(E, D, M)), jnp.bfloat16)

    def product(x):
        return hopper.matmul(x, weight, jnp.asarray(first), jnp.asarray(load, jnp.int32), True, interpreter())

    together = np.asarray(jax.vmap(product)(x), np.float64)
    for e, (start, count) in enumerate(zip(first, load, strict=True)):
        want = np.asarray(x, np.float64)[:, start : start + count] @ np.asarray(weight[e], np.float64)
        np.testing.assert_allclose(together[:, start : start + count], want, rtol=0.01, atol=0.1)
    program = str(jax.make_jaxpr(jax.vmap(product))(x))
    assert f"bf16[{N * rows},{M}]" in program, "one kernel for all"


@pytest.mark.usefixtures("small_tiles")
def test_weights_in_a_batch():
    """Nothing here asks for it, but ``vmap`` may: one product after the other."""
    load = (3, 0, 0, 18)
    first, rows = rows_of(load)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, D)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(2, E, D, M)), jnp.bfloat16)

    def product(weight):
        return hopper.matmul(x, weight, jnp.asarray(first), jnp.asarray(load, jnp.int32), True, interpreter())

    for n, y in enumerate(jax.vmap(product)(weights)):
        want = np.asarray(x, np.float64)[first[3] : first[3] + 18] @ np.asarray(weights[n, 3], np.float64)
        np.testing.assert_allclose(np.asarray(y, np.float64)[first[3] : first[3] + 18], want, rtol=0.01, atol=0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=5, max_size=5))
def test_tiles_cover_every_row_once(loads):
    load = np.array(loads, np.int32)
    aligned = -(-load // 8) * 8
    first = (np.cumsum(aligned) - aligned).astype(np.int32)
    *tiles, counts = np.asarray(tile_table(jnp.asarray(first), jnp.asarray(aligned), 5 * 704, 128))
    assert (counts == counts[0]).all()
    assert counts[0] <= len(counts)
    assert (tiles[2][counts[0] :] == 0).all()
    tiles = np.stack(tiles, 1)[: counts[0]]
    covered = np.zeros(aligned.sum(), int)
    for expert, start, rows in tiles:
        assert start % 8 == rows % 8 == 0
        assert 0 < rows <= 128
        assert first[expert] <= start
        assert start + rows <= first[expert] + aligned[expert]
        covered[start : start + rows] += 1
    assert (covered == 1).all()


@pytest.mark.usefixtures("hopper_gpu")
def test_a_program_is_the_same_whatever_was_lowered_before():
    """Else the persistent cache would only find what processes lower in one order. jax 0.10 never counted."""

    before = program(1, 256)
    assert program(1, 512) != before
    jax.clear_caches()
    assert program(1, 256) == before


@pytest.mark.usefixtures("hopper_gpu")
def test_layers_of_equal_shapes_share_one_kernel():
    """Each takes a fifth of a second to lower, before the persistent cache is looked at."""
    assert program(3, 256).count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("hopper_gpu", "x64")
def test_lowered_with_64_bits():
    assert "mosaic_gpu_v2" in program(1, 256)


def program(layers, rows):
    """Square products one after another, lowered for a GPU."""
    shapes = [(rows, D), (layers, E, D, D)]
    operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes] + [jax.ShapeDtypeStruct((E,), jnp.int32)] * 2

    def run(x, weights, first, load):
        for weight in weights:
            x = hopper.matmul(x, weight, first, load, False)
        return x

    return jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("hopper_gpu")
class TestChoice:
    def supported(
        self, x_dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16, shape=(E, 2, 64, 128), by_expert=True, **options
    ):
        assignment = assign(jnp.arange(6).reshape(3, 2) % E, E, by_expert=by_expert, **options)
        x = jnp.zeros((len(assignment.row_to_slot), shape[-1]), x_dtype)
        return hopper.supports(x, jnp.zeros(shape, weight_dtype), assignment)

    def test_taken(self):
        assert self.supported()

    @pytest.mark.parametrize(
        "options",
        [
            {"x_dtype": jnp.float32, "weight_dtype": jnp.float32},
            {"weight_dtype": jnp.float32},
            {"shape": (E, 2, 64, 96)},
            {"shape": (E, 80, 128)},
            {"by_expert": False},
        ],
        ids=["float32", "mixed", "inputs", "outputs", "by-slot"],
    )
    def test_not_taken(self, options):
        assert not self.supported(**options)

    def test_packed(self):
        assignment = assign(jnp.arange(6).reshape(3, 2) % E, E)
        packed = jax.eval_shape(lambda: MXFP4.random(jax.random.key(0), (E, 2, 64, 128)))
        assert hopper.supports(jnp.zeros((len(assignment.row_to_slot), 128), jnp.bfloat16), packed, assignment)

    def test_other_gpus(self, monkeypatch):
        monkeypatch.setattr(hopper, "target", lambda *_: SimpleNamespace(compute_capability="8.0", core_count=108))
        assert not self.supported()

    @pytest.mark.parametrize("columns", [64, 192, 1536, 2048, 2880, 5760, 11264])
    @pytest.mark.parametrize("rows", [64, 4096, 65536])
    @pytest.mark.parametrize("depth", [64, 2048, 2880])
    def test_tiles_divide_the_matrices(self, rows, depth, columns):
        tile = hopper.tiling(rows, 64, depth, columns)
        assert columns % tile.columns == depth % tile.depth == 0
        # of shared memory: what is copied ahead, and what waits to be stored
        ahead = tile.stages * (128 + tile.columns) * tile.depth
        assert 2 * (ahead + 128 * min(128, tile.columns)) <= 227 * 1024 - 1024
