"""The kernel for packed matrices on Hopper GPUs: what it is given, when it is taken, and, on one, against numpy.

Its threads run assembler, which Pallas's interpreter has not; elsewhere it is lowered and not run.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from matrices import BOTH_WAYS, close, normal, weights, wide
from slots import LOADS, rows_of

from moejax.ops import mxfp4
from moejax.ops.experts import assign
from moejax.ops.experts.matmul import _wgmma_fragments, hopper, mxfp4_hopper, packed
from moejax.ops.mxfp4 import MXFP4

E, D, M = 4, 352, 320
"""Widths that neither tiles nor blocks of 128 divide."""

HOPPER_ONLY = pytest.mark.skipif(
    not (jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"), reason="runs on a Hopper GPU"
)


def test_rows_stand_as_threads_contract_them():
    """What a thread holds of a row of packed weights, by the order of its nibbles, meets the same entries of ``x``."""
    x, packed_row = normal(3, D), weights(1, D)
    placed = wide(mxfp4_hopper.rows_in_fragment_order(x))
    assert placed.shape == (3, 384)
    entries = np.pad(wide(packed_row)[0], (0, 32)).reshape(-1, 4, 4, 8)  # block of 128, place, word, nibble
    held = np.zeros((3, 8, 16))
    for step in range(8):
        for place in range(4):
            for pair in range(2):
                word, n = step // 2, 2 * (step % 2) + pair
                at = 2 * place + 8 * pair
                held[:, step, at : at + 2] = entries[:, place, word, [n, n + 4]]
    np.testing.assert_allclose(placed @ held.ravel(), wide(x) @ wide(packed_row)[0], rtol=1e-12)


def test_pairs_of_codes():
    """What the assembler makes of a word, in numpy: every code in every place, before the product with the scale."""
    words = np.array([code << 4 * place for code in range(16) for place in range(8)], np.uint32)
    codes = words[:, None] >> 4 * np.arange(8, dtype=np.uint32) & 15
    registers = {"$4": words}
    values = []
    for step in filter(None, _wgmma_fragments._FOUR_PAIRS.split(";")):
        name, to, first, second = step.replace(",", "").split()
        operands = [registers.get(o, o) for o in (first, second)]
        if name == "mul.rn.bf16x2":
            # bfloat16 is the upper half of float32; numbers in the order that entries 4 places apart have
            halves = [operands[0] << 16, operands[0] & np.uint32(0xFFFF0000)]
            values.append(np.stack([h.view(np.float32).astype(np.float64) * 2.0**126 for h in halves], -1))
            continue
        compute = {"shr.b32": np.right_shift, "and.b32": np.bitwise_and, "mul.lo.u32": np.multiply}[name]
        registers[to] = compute(operands[0], np.uint32(int(operands[1], 0)))
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    want = np.where(codes < 8, e2m1[codes % 8], -e2m1[codes % 8])
    np.testing.assert_array_equal(np.stack(values, -2), np.stack([want[:, :4], want[:, 4:]], -1))


def lowered(products: int, transpose: bool, rows: int = 128, m: int = M, d: int = D, batch: tuple = ()) -> str:
    """Products of one shape one after another, lowered for a GPU."""

    def run(x, weight, first, load):
        def product(x):
            return packed.matmul(x, weight, None, first, load, transpose)

        return [(jax.vmap(product) if batch else product)(x + n) for n in range(products)]

    shapes = (*batch, rows, m if transpose else d), (E,), (E,)
    x, *ends = (jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, (jnp.bfloat16, jnp.int32, jnp.int32), strict=True))
    weight = jax.eval_shape(lambda: MXFP4.random(jax.random.key(0), (E, m, d)))
    return jax.jit(run).trace(x, weight, *ends).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("hopper_gpu")
@BOTH_WAYS
def test_lowered_once_for_equal_shapes(transpose):
    assert lowered(3, transpose).count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("hopper_gpu")
@BOTH_WAYS
@pytest.mark.parametrize(
    "shape",
    [{"rows": 96, "m": 256, "d": 256}, {"d": 288}, {"batch": (3,)}, {"batch": (16,), "rows": 2272}],
    ids=["smallest", "odd-block", "cotangents", "many-tiles"],
)
def test_lowered(transpose, shape):
    assert lowered(1, transpose, **shape).count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("hopper_gpu", "x64")
@BOTH_WAYS
def test_lowered_with_64_bits(transpose):
    assert lowered(1, transpose).count("mosaic_gpu_v2") == 1


class TestChoice:
    def supported(self, rows=128, m=M, d=D):
        return mxfp4_hopper.supports_shapes(rows, m, d)

    @pytest.mark.usefixtures("hopper_gpu")
    def test_supported(self):
        assert self.supported()
        assert not self.supported(rows=88)
        assert not self.supported(rows=100)
        assert not self.supported(m=192)
        assert not self.supported(m=336)
        assert not self.supported(d=224)

    @pytest.mark.usefixtures("hopper_gpu")
    def test_taken_without_the_other_kernel(self, monkeypatch):
        """JAX will drop what lowers that one."""
        monkeypatch.setattr(packed, "takes_triton", lambda _: False)
        weight = MXFP4.random(jax.random.key(0), (E, 2, M // 2, D))
        for by_expert in (True, False):
            slots = assign(jnp.zeros((96, 1), jnp.int32), E, by_expert=by_expert)
            assert packed.supports(normal(len(slots.row_to_slot), D), weight, slots) == by_expert

    def test_other_gpus(self, hopper_gpu):
        hopper_gpu.compute_capability = "8.0"
        assert not self.supported()

    @pytest.mark.parametrize("many", [16, 64], ids=["many-rows", "fewer"])
    def test_by_the_mesh(self, monkeypatch, hopper_gpu, many):
        """The devices that a program is for are not the default one; very many rows are unpacked once."""
        calls = []
        for module in (hopper, mxfp4_hopper):
            monkeypatch.setattr(module, "target", lambda mesh=None: jax.devices()[0] if mesh is None else hopper_gpu)
        monkeypatch.setattr(packed, "_MANY_ROWS", many)
        monkeypatch.setattr(hopper, "matmul", lambda x, *_, mesh: calls.append(("hopper", mesh)) or x)
        monkeypatch.setattr(mxfp4_hopper, "matmul", lambda x, *rest: calls.append(("packed", rest[-1])) or x)
        mesh, load = Mesh(np.array(jax.devices()[:1]), ("expert",)), jnp.full(E, 32)
        packed.matmul(normal(E * 32, 384), weights(E, M, 384), None, load, load, False, mesh=mesh)
        assert calls == [("hopper" if many == 16 else "packed", mesh)]


@pytest.fixture
def two_processors(monkeypatch):
    """So that each takes many tiles, and every stage is used anew."""
    monkeypatch.setattr(mxfp4_hopper, "target", lambda *_: SimpleNamespace(core_count=2))


@HOPPER_ONLY
@pytest.mark.usefixtures("two_processors")
@BOTH_WAYS
@pytest.mark.parametrize(("m", "d"), [(M, D), (1024, 1024), (1088, 1056)], ids=["few-steps", "even", "odd"])
@pytest.mark.parametrize(
    "load", [*LOADS.values(), (97, 0, 250, 64), (81, 80, 1, 96)], ids=[*LOADS, "several-tiles", "heights"]
)
def test_against_numpy(load, m, d, transpose):
    first, rows = rows_of(load)
    x, weight = normal(max(rows, 96), m if transpose else d), weights(E, m, d)
    y = wide(mxfp4_hopper.matmul(x, weight, jnp.asarray(first), jnp.asarray(load, jnp.int32), transpose))
    for matrix, start, count in zip(wide(weight), first, load, strict=True):
        part = slice(start, start + count)
        close(y[part], wide(x)[part] @ (matrix if transpose else matrix.T))


@HOPPER_ONLY
@pytest.mark.usefixtures("two_processors")
@BOTH_WAYS
def test_table_too_long_to_copy(monkeypatch, transpose):
    load, m, d = np.full(8, 104), 512, 320
    first, weight, x = np.arange(8) * 104, weights(8, m, d), normal(832, m if transpose else d)

    def run():
        return np.asarray(mxfp4_hopper.matmul(x, weight, jnp.asarray(first), jnp.asarray(load), transpose))

    copied = run()
    jax.clear_caches()
    monkeypatch.setattr(mxfp4_hopper, "_MAX_COPIED_TILES", 0)
    np.testing.assert_array_equal(run(), copied)


@HOPPER_ONLY
@BOTH_WAYS
def test_every_code_and_scale(transpose):
    """A product with the identity, so that results are the values: to the bit, between 2^-100 and scale 2^33."""
    scales = np.arange(28, 161)
    scales = np.pad(scales, (0, 256 + 128 - len(scales)), mode="edge")[:, None]
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (len(scales), 16, 16))
    weight = MXFP4(jnp.asarray(codes)[None], jnp.asarray(np.broadcast_to(scales, (len(scales), 16)), jnp.uint8)[None])
    eye = jnp.eye(len(scales) if transpose else 512, dtype=jnp.bfloat16)
    y = mxfp4_hopper.matmul(eye, weight, jnp.zeros(1, jnp.int32), jnp.full(1, len(eye)), transpose)
    want = np.asarray(mxfp4._unpack_by_bits(weight.blocks, weight.scales), np.float32).reshape(len(scales), 512)
    np.testing.assert_array_equal(np.asarray(y, np.float32), want if transpose else want.T)


@HOPPER_ONLY
@BOTH_WAYS
def test_again_and_again(transpose):
    """Nothing depends on which warp is first: weights in registers, say, that the matrix unit still reads."""
    load = jnp.asarray(np.random.default_rng(2).multinomial(640, np.full(8, 1 / 8)), jnp.int32)
    aligned = -(-load // 8) * 8
    weight, x = weights(8, 5760, 2880), normal(704, 5760 if transpose else 2880)
    product = jax.jit(mxfp4_hopper.matmul, static_argnums=4)
    every = [np.asarray(product(x, weight, jnp.cumsum(aligned) - aligned, load, transpose)) for _ in range(100)]
    first = np.asarray(jnp.cumsum(aligned) - aligned)
    used = np.concatenate([np.arange(s, s + n) for s, n in zip(first, load, strict=True)])
    assert all(np.array_equal(every[0][used], y[used]) for y in every)
    for e, (start, count) in enumerate(zip(first, load, strict=True)):
        part, matrix = slice(start, start + int(count)), wide(weight[e])
        close(wide(every[0])[part], wide(x)[part] @ (matrix if transpose else matrix.T))
