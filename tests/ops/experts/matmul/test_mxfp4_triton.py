"""The kernel for packed matrices, run by Pallas's interpreter, against numpy; what it is given, and when it is taken.

Only a GPU runs the assembler in it: there, every code and scale is compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from matrices import BOTH_WAYS, close, normal, weights, wide
from slots import LOADS, rows_of

from moejax.ops import mxfp4
from moejax.ops.experts import assign, grouped_matmul, permute, unpermute
from moejax.ops.experts.matmul import hopper, mxfp4_triton, packed
from moejax.ops.mxfp4 import MXFP4

E, D, M, N = 4, 96, 80, 3
"""Widths that no tile divides."""


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows and 64 columns, so that few rows fill several tiles."""
    monkeypatch.setattr(mxfp4_triton, "tiling", lambda *_: mxfp4_triton.MXFP4TritonTiling(16, 64, 64, 4, 2))


@pytest.mark.usefixtures("small_tiles")
@BOTH_WAYS
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_against_numpy(load, transpose):
    first, rows = rows_of(load)
    x, weight = normal(rows, M if transpose else D), weights(E, M, D)
    y = packed.matmul(x, weight, None, jnp.asarray(first), jnp.asarray(load, jnp.int32), transpose, True)
    assert y.shape == (rows, D if transpose else M)
    for matrix, start, count in zip(wide(weight), first, load, strict=True):
        part = slice(start, start + count)
        close(wide(y)[part], wide(x)[part] @ (matrix if transpose else matrix.T))


@pytest.mark.parametrize("rows", [10, 100, 2000], ids=["few", "some", "many"])
@BOTH_WAYS
def test_true_tiles(rows, transpose):
    first, load = jnp.zeros(1, jnp.int32), jnp.full(1, rows, jnp.int32)
    x, weight = normal(rows, 64 if transpose else 32), weights(1, 64, 32)
    y = packed.matmul(x, weight, None, first, load, transpose, True)
    close(wide(y), wide(x) @ (wide(weight)[0] if transpose else wide(weight)[0].T))


@BOTH_WAYS
def test_rows_with_experts_of_their_own(monkeypatch, transpose):
    """As when decoding: any expert, also twice; and rows that go nowhere. Parts of a row are summed apart."""
    monkeypatch.setattr(mxfp4_triton, "tiling", lambda *_: mxfp4_triton.MXFP4TritonTiling(16, 64, 32, 4, 2, parts=2))
    expert, load = jnp.array([2, 0, 2, 3, 1]), jnp.array([1, 1, 1, 0, 1])
    x, weight = normal(5, M if transpose else D), weights(E, M, D)
    y = packed.matmul(x, weight, expert, jnp.arange(5), load, transpose, True)
    for n in (0, 1, 2, 4):
        matrix = wide(weight)[int(expert[n])]
        close(wide(y)[n], wide(x)[n] @ (matrix if transpose else matrix.T))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("by_expert", [True, False], ids=["by-expert", "by-slot"])
def test_cotangents_share_the_weights(by_expert):
    """A batch of rows is one product, in which a row's copies stand together."""
    load = LOADS["uneven"] if by_expert else (1, 1, 1)
    first, rows = rows_of(load) if by_expert else (np.arange(3, dtype=np.int32), 3)
    expert = None if by_expert else jnp.array([3, 1, 3])
    x, weight = normal(N, rows, M), weights(E, M, D)

    def product(x):
        return packed.matmul(x, weight, expert, jnp.asarray(first), jnp.asarray(load, jnp.int32), True, True)

    together = wide(jax.vmap(product)(x))
    for n, (start, count) in enumerate(zip(first, load, strict=True)):
        matrix = wide(weight)[n if expert is None else int(expert[n])]
        close(together[:, start : start + count], wide(x)[:, start : start + count] @ matrix)
    program = str(jax.make_jaxpr(jax.vmap(product))(x))
    assert program.count("pallas_call[") == 1
    assert f"bf16[{N * rows},{D}]" in program, "one kernel for all"


@pytest.mark.usefixtures("small_tiles")
def test_weights_in_a_batch():
    """Nothing here asks for it, but ``vmap`` may: one product after the other."""
    first, rows = rows_of((3, 0, 0, 18))
    x, both = normal(rows, D), weights(2, E, M, D)

    def product(weight):
        return packed.matmul(x, weight, None, jnp.asarray(first), jnp.array([3, 0, 0, 18]), False, True)

    for y, matrices in zip(jax.vmap(product)(both), wide(both), strict=True):
        close(wide(y)[first[3] : first[3] + 18], wide(x)[first[3] : first[3] + 18] @ matrices[3].T)


@pytest.mark.usefixtures("small_tiles")
def test_experts_in_a_batch():
    """Of two tokens that are decoded apart; the matrices are not copied for each."""
    x, weight, expert = normal(2, 1, D), weights(E, M, D), jnp.array([[3], [1]])

    def product(x, expert):
        return packed.matmul(x, weight, expert, jnp.arange(1), jnp.ones(1, int), False, True)

    for n, y in enumerate(jax.vmap(product)(x, expert)):
        close(wide(y), wide(x)[n] @ wide(weight)[int(expert[n, 0])].T)
    assert f"u8[2,{E}," not in str(jax.make_jaxpr(jax.vmap(product))(x, expert))


@pytest.fixture
def gpu(monkeypatch, hopper_gpu):
    """As if there were a Hopper GPU, but for the interpreter that runs its kernel for packed matrices."""
    kernel = packed.matmul
    monkeypatch.setattr(packed, "matmul", lambda *operands, **options: kernel(*operands, **options, interpret=True))
    return hopper_gpu


@pytest.mark.usefixtures("gpu", "small_tiles")
@pytest.mark.parametrize("by_expert", [True, False], ids=["by-expert", "by-slot"])
def test_in_the_grouped_product(by_expert):
    """Taken by default, for rows in either order; two axes of outputs; the gradient; slots that go nowhere."""
    ids = jnp.array([[0, 3], [1, E], [3, 0]])
    weight, x = weights(E, 2, M // 2, D), normal(3, 1, D)
    slots = assign(ids, E, allow_unassigned=True, by_expert=by_expert)

    def product(x, implementation=None):
        return unpermute(grouped_matmul(permute(x, slots), weight, slots, implementation=implementation), slots)

    other = "hopper" if by_expert else "gather"
    assert "pallas_call" in str(jax.make_jaxpr(product)(x))
    result, pull = jax.vjp(product, x)
    want, want_pull = jax.vjp(lambda x: product(x, "padded" if by_expert else other), x)
    assert result.shape == (3, 2, 2, M // 2)
    assert not np.asarray(result[1, 1]).any()
    close(wide(result), wide(want))
    cotangent = normal(*result.shape)
    np.testing.assert_allclose(wide(pull(cotangent)[0]), wide(want_pull(cotangent)[0]), rtol=0.02, atol=0.3)


@pytest.mark.usefixtures("gpu")
class TestChoice:
    def supported(self, dtype=jnp.bfloat16, weight=None, mesh=None):
        slots = assign(jnp.arange(6).reshape(3, 2) % E, E, mesh=mesh)
        weight = weights(E, 2, 40, D) if weight is None else weight
        return packed.supports(jnp.zeros((len(slots.row_to_slot), D), dtype), weight, slots)

    def test_taken(self):
        assert self.supported()

    def test_not_taken(self):
        assert not self.supported(dtype=jnp.float32)
        assert not self.supported(weight=jnp.zeros((E, 80, D), jnp.bfloat16))
        huge = jax.eval_shape(lambda: MXFP4.random(jax.random.key(0), (1024, 2880, 2880)))
        assert not self.supported(weight=huge)

    @pytest.mark.parametrize(("axes", "kernel"), [(("expert",), True), (("expert", "data"), False)])
    def test_devices(self, axes, kernel):
        """What XLA splits by another axis it cannot split inside of a kernel."""
        mesh = Mesh(np.array([jax.devices()[0]] * 2 ** len(axes)).reshape((2,) * len(axes)), axes)
        assert self.supported(mesh=mesh) == kernel

    def test_parts_where_rows_are_few(self):
        assert mxfp4_triton.tiling(4, 4, 5760, False).parts == 3
        assert mxfp4_triton.tiling(2304, 32, 2880, False).parts == 1
        assert mxfp4_triton.tiling(65536, 4, 5760, False).parts == 1, "a float32 result for each part"

    @pytest.mark.parametrize(
        ("capability", "kernel"), [("8.0", True), ("10.0", True), ("7.5", False), ("gfx942", False)]
    )
    def test_other_gpus(self, gpu, capability, kernel):
        gpu.compute_capability = capability
        assert self.supported() == kernel

    def test_many_rows_are_multiplied_by_unpacked_matrices(self, monkeypatch):
        calls = []
        monkeypatch.setattr(packed, "_MANY_ROWS", 16)
        monkeypatch.setattr(hopper, "matmul", lambda x, weight, *_, **__: calls.append(weight) or x)
        load = jnp.full(E, 16)
        packed.matmul(normal(E * 16, 128), weights(E, 64, 128), None, load, load, False)
        assert [(call.shape, call.dtype) for call in calls] == [((E, 64, 128), jnp.bfloat16)]

    def test_matrices_that_are_not_packed(self):
        slots = assign(jnp.zeros((1, 1), jnp.int32), E)
        x = jnp.zeros((len(slots.row_to_slot), D))
        with pytest.raises(ValueError, match="'packed' is for matrices kept in MXFP4, not in float32"):
            grouped_matmul(x, jnp.zeros((E, M, D)), slots, implementation="packed")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs on an NVIDIA GPU")
@BOTH_WAYS
def test_every_code_and_scale_on_a_gpu(transpose):
    """A product with the identity, so that results are the values: each to the bit whose matrix has no infinite one."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (251, 16, 16))
    scales = np.broadcast_to(np.arange(2, 253, dtype=np.uint8)[:, None], (251, 16))
    weight = MXFP4(jnp.asarray(codes)[None], jnp.asarray(scales)[None])
    eye = jnp.eye(251 if transpose else 512, dtype=jnp.bfloat16)
    y = packed.matmul(eye, weight, None, jnp.zeros(1, jnp.int32), jnp.full(1, len(eye)), transpose)
    want = np.asarray(mxfp4._unpack_by_bits(weight.blocks, weight.scales), np.float32).reshape(251, 512)
    np.testing.assert_array_equal(np.asarray(y, np.float32), want if transpose else want.T)
