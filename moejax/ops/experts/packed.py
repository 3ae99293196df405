"""The grouped product with matrices in MXFP4, unpacked in registers: a quarter of the bytes that bfloat16 ones take.

Rows by expert, a hundred or more, go to :mod:`moejax.ops.experts.hopper_packed` where it suits. Others go to a kernel
for NVIDIA GPUs that is written here, in Pallas (lowered by Triton): rows are cut into tiles group by group, and every
program multiplies one of them with some columns.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int, UInt8

from moejax.ops.device import takes_triton, whole
from moejax.ops.experts import hopper, hopper_packed
from moejax.ops.experts.assignment import Assignment
from moejax.ops.experts.tiles import cut, rows_together
from moejax.ops.mxfp4 import BLOCK, MXFP4, unpacked_in_turn

_MANY = 2048
"""Mean rows of an expert from which on unpacking once takes less time than unpacking in every tile."""

_PROGRAMS = 400
"""As many as a large GPU runs at a time; with fewer, tiles are smaller."""


class Tiling(NamedTuple):
    """Rows and columns of a tile, what a step contracts, warps of a program, steps that are copied ahead.

    ``parts`` of the contracted axis are summed apart, so that there are enough programs where rows are few.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1


def fits(x: Float[Array, "P D"], weight: Float[Array, "E *M D"] | MXFP4, assignment: Assignment) -> bool:
    """Whether there is a GPU for one of the kernels (compute capability 8 or later) that takes these operands.

    Both ways: the product with the transposed matrices too.
    """
    if not isinstance(weight, MXFP4) or x.dtype != jnp.bfloat16 or not whole(assignment.mesh):
        return False
    sizes = len(x), math.prod(weight.shape[1:-1]), weight.shape[-1]
    if assignment.by_expert and hopper_packed.suits(*sizes, assignment.mesh):
        return True
    # offsets are counted in 32 bits
    small = math.prod(weight.shape) // 2 < 2**31
    return small and takes_triton(assignment.mesh)


def tiling(rows: int, groups: int, columns: int, transpose: bool) -> Tiling:
    """For ``rows`` in all and that many columns of the product."""
    if transpose:
        return Tiling(64, 128, 64, 4, 3)
    height = next(h for h in (16, 32, 64) if h == 64 or 2 * rows <= h * groups)
    if max(groups, rows // height) * columns < _PROGRAMS * 128:
        return Tiling(height, 64, 128, 4, 4, 3)
    return Tiling(height, 128, 128, 4, 3)


def matmul(
    x: BFloat16[Array, "P A"],
    weight: MXFP4,
    expert: Int[Array, " G"] | None,
    first: Int[Array, " G"],
    load: Int[Array, " G"],
    transpose: bool,
    interpret: bool = False,
    mesh: Mesh | None = None,
) -> BFloat16[Array, "P B"]:
    """Rows ``first[g]`` to ``first[g] + load[g]`` times the transposed matrix of ``expert[g]``, or times the matrix.

    ``weight`` has shape ``[E, M, D]``. Without ``expert``, group ``g`` is that of expert ``g``, and ``first`` has
    multiples of 8, and on Hopper GPUs another kernel multiplies, with very many rows that of
    :mod:`moejax.ops.experts.hopper` after matrices are unpacked once. With a batch of ``x`` the weights are read once.
    What other rows hold is left open.
    """
    run = partial(_product, transpose=transpose, interpret=interpret, mesh=mesh)
    return rows_together(run)(x, (weight, expert), first, load)


def _product(
    x: Array, weights: tuple, first: Array, load: Array, *, transpose: bool, interpret: bool, mesh: Mesh | None
) -> Array:
    weight, expert = weights
    _, m, d = weight.shape
    if expert is None and len(x) >= _MANY * len(load) and hopper.suits(x.dtype.itemsize, m, d, mesh=mesh):
        x, full = unpacked_in_turn(x, weight)
        return hopper.matmul(x, full, first, load, transpose, mesh=mesh)
    if expert is None and not interpret and hopper_packed.suits(len(x), m, d, mesh):
        return hopper_packed.matmul(x, weight, first, load, transpose, mesh)
    tile = tiling(len(x), len(load), d if transpose else m, transpose)
    if len(x) <= tile.rows:  # and so has no group more
        group = jnp.arange(len(load), dtype=jnp.int32)
        table = jnp.stack([group if expert is None else expert, first, load])
    else:
        table = cut(first, load, len(x), tile.rows)
        table = table if expert is None else table.at[0].set(expert[table[0]])
    return _kernel(x if transpose else _rows_by_lane(x), weight, table, tile, transpose, interpret)


# layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("t", "transpose", "interpret"))
def _kernel(x: Array, weight: MXFP4, table: Array, t: Tiling, transpose: bool, interpret: bool) -> Array:
    # imported late: it takes a quarter of a second, and only such a GPU needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    _, m, d = weight.shape
    depth, width = (m, d) if transpose else (d, m)
    steps = -(-depth // (t.depth * t.parts))

    def region(lead: tuple, i: Array, j: Array, ends: tuple) -> tuple[tuple, Array]:
        return (*lead, i[:, None], j[None]), (i < ends[0])[:, None] & (j < ends[1])[None]

    def body(x, blocks, scales, table, y):
        column, tile, part = (pl.program_id(n) for n in range(3))

        # none in the tiles that are left over
        @pl.when(table[2, tile] > 0)
        def _tile():
            expert, first, held = (table[n, tile] for n in range(3))
            rows = first + jnp.arange(t.rows)

            def read(array: Any, *where: Any) -> Array:
                index, inside = region(*where)
                return gpu.load(array.at[index], mask=inside, other=0)

            def entries(array: Any, step: Array | int, values: int) -> Array:
                # of an array that has an entry for so many values
                along, across = (step, t.depth), (column, t.columns)
                (i, height), (j, length) = (along, across) if transpose else (across, along)
                length //= values
                ends = (m, d // values)
                return read(array, (expert,), i * height + jnp.arange(height), j * length + jnp.arange(length), ends)

            def step(i: Array, carry: tuple) -> tuple:
                sums, scale = carry
                k = part * steps + i
                # of the next step: too narrow for Triton to copy them ahead
                following = entries(scales, k + 1, BLOCK)
                halves = _unpacked(entries(blocks, k, 2), scale, interpret)
                xs = read(x, (), rows, k * t.depth + jnp.arange(t.depth), (first + held, depth))
                return (_plus_matrix if transpose else _plus_transposed)(sums, xs, halves), following

            zero = jnp.zeros((t.rows, t.columns // 2) if transpose else (t.columns, t.rows), jnp.float32)
            start = (zero, zero) if transpose else zero, entries(scales, part * steps, BLOCK)
            sums, _ = lax.fori_loop(0, steps, step, start)
            found = _interleaved(*(s.astype(y.dtype) for s in sums)) if transpose else sums.T.astype(y.dtype)
            index, inside = region((part,), rows, column * t.columns + jnp.arange(t.columns), (first + held, width))
            gpu.store(y.at[index], found, mask=inside)

    # what a profile shows
    body.__name__ = f"packed_matmul_{len(x)}x{depth}x{width}"
    run = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((t.parts, len(x), width), x.dtype if t.parts == 1 else jnp.float32),
        grid=(-(-width // t.columns), table.shape[1], t.parts),
        compiler_params=gpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
    )
    y = run(x, weight.blocks.reshape(len(weight.blocks), m, d // 2), weight.scales, table)
    return y[0] if t.parts == 1 else y.sum(0).astype(x.dtype)


def _plus_transposed(sums: Array, x: Array, halves: tuple[Array, Array]) -> Array:
    """``sums [C, R]`` and ``W x^T``, with ``x`` as :func:`_rows_by_lane` orders it."""
    weight = _by_lane(_interleaved(*halves))
    return sums + lax.dot_general(weight, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _plus_matrix(sums: tuple[Array, Array], x: Array, halves: tuple[Array, Array]) -> tuple[Array, ...]:
    """``sums [R, C/2]`` and ``x W``, of even columns and of odd ones."""
    return tuple(s + jnp.dot(x, w, preferred_element_type=jnp.float32) for s, w in zip(sums, halves, strict=True))


def _by_lane(weight: Float[Array, "C D"]) -> Float[Array, "C D"]:
    """Columns reordered within blocks of 32, so that packed weights reach the threads that multiply them 4 bytes each.

    A thread of a quad holds, of 16 columns that the matrix unit contracts, the pairs 2q and 2q + 8. It is given the
    bytes 4q to 4q + 3 of a block: their low halves are these pairs of the block's first 16 columns, the high ones of
    the others.
    """
    # quad, pair, one of it, half of the byte -> half, pair, quad, one of it
    return weight.reshape(len(weight), -1, 4, 2, 2, 2).transpose(0, 1, 5, 3, 2, 4).reshape(weight.shape)


def _rows_by_lane(x: Float[Array, "P D"]) -> Float[Array, "P D"]:
    """The same of rows outside of the kernel: as a copy by index, which XLA makes part of what computes them."""
    block = np.arange(BLOCK).reshape(4, 2, 2, 2).transpose(3, 1, 0, 2).ravel()
    index = np.arange(0, x.shape[1], BLOCK)[:, None] + block
    return x.at[:, index.ravel().astype(np.uint32)].get(mode="promise_in_bounds", unique_indices=True)


def _interleaved(even: Float[Array, "R H"], odd: Float[Array, "R H"]) -> Float[Array, "R 2*H"]:
    return jnp.concatenate([even[..., None], odd[..., None]], -1).reshape(len(even), -1)


def _unpacked(
    pairs: UInt8[Array, "A B"], scales: UInt8[Array, "A N"], interpret: bool
) -> tuple[BFloat16[Array, "A B"], BFloat16[Array, "A B"]]:
    """Values of the low halves of bytes and of the high ones."""
    # powers of two as bfloat16, of which that of scale 0 is below the normal ones, and that of 255 infinite
    powers = lax.bitcast_convert_type(jnp.maximum(scales.astype(jnp.int16) << 7, jnp.int16(0x40)), jnp.bfloat16)
    powers = jnp.broadcast_to(powers[..., None], (*powers.shape, BLOCK // 2)).reshape(pairs.shape)
    values = _counted if interpret else _in_registers
    return values(pairs, False) * powers, values(pairs, True) * powers


def _counted(pairs: UInt8[Array, "A B"], high: bool) -> BFloat16[Array, "A B"]:
    """What :func:`_in_registers` computes, where there is no such assembler."""
    code = (pairs >> 4 if high else pairs & 15).astype(jnp.int32)
    size = code & 7
    twice = jnp.where(size < 2, size, (2 | size & 1) << jnp.maximum((size >> 1) - 1, 0))
    return jnp.where(code < 8, twice, -twice).astype(jnp.bfloat16) * jnp.bfloat16(0.5)


def _in_registers(pairs: UInt8[Array, "A B"], high: bool) -> BFloat16[Array, "A B"]:
    """The four-bit floats in the low or high halves of bytes, four bytes at a time: two operations a value.

    Exponent and mantissa go where bfloat16 has the lowest bits of its exponent and the highest of its mantissa. That is
    the number times 2^-126, for the subnormal one too, which the multiplication respects.
    """
    from jax.experimental.pallas import triton as gpu

    sign, size = ("mov.b32 s, p;", "shr.b32 v, p, 6;") if high else ("shl.b32 s, p, 4;", "shr.b32 v, p, 2;")
    # a byte in the upper half of 16 bits; sign and size; times 2^126, plus -0
    two = """
    prmt.b32 p, $2, 0, {bytes}; {sign} {size}
    and.b32 s, s, 0x80008000; lop3.b32 v, s, v, 0x01C001C0, 0xF8;
    fma.rn.bf16x2 {out}, v, m, z;"""
    halves = [two.format(bytes=b, sign=sign, size=size, out=o) for b, o in (("0x1404", "$0"), ("0x3424", "$1"))]
    asm = "{ .reg .b32 p, s, v, m, z; mov.b32 m, 0x7E807E80; mov.b32 z, 0x80008000;" + "".join(halves) + "}"
    (values,) = gpu.elementwise_inline_asm(
        asm,
        args=[pairs],
        constraints="=&r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(pairs.shape, jnp.bfloat16)],
    )
    return values
