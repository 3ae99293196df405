"""The grouped matmul with matrices in MXFP4 as one kernel for NVIDIA GPUs, written in Pallas (lowered by Triton).

Groups of rows are cut into tiles (:mod:`moejax.ops.experts.matmul.tile_table`). A program multiplies one tile of rows
with some columns, and unpacks the weights in registers on the way. Without ``transpose`` it computes the transposed
result, so that the weights are the left operand, which the matrix unit reads from registers::

                      depth                                           rows
                 +-------------+           rows                    +---------+
                 |             |        +---------+                |         |
        columns  | W (packed,  |   @    |   x^T   | depth    =     |   y^T   | columns
                 |  unpacked   |        |         |                |         |
                 |  in regs)   |        +---------+                +---------+
                 +-------------+

With ``transpose`` it is ``y = x W``, one product for the even columns of ``W`` and one for the odd ones, which are the
low and the high halves of the packed bytes. Triton allocates the shared memory, for the operands of ``num_stages``
steps. For one step and the largest tiles these are, in bytes:

=======  ============================  ==================
operand  shape                         bytes
=======  ============================  ==================
blocks   [128, 64] bytes               8 KiB
x        [64, 128] of bfloat16         16 KiB
scales   [128, 4] bytes                0.5 KiB, in registers
=======  ============================  ==================
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, UInt8

from moejax.ops.experts.matmul.tile_table import tile_table
from moejax.ops.mxfp4 import BLOCK, MXFP4

_PROGRAMS = 400
"""Programs that a large GPU runs at a time. If there would be fewer, tiles are smaller."""


class MXFP4TritonTiling(NamedTuple):
    """Sizes of the kernel.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile.
        depth: how much of the contracted axis one step multiplies.
        warps: warps of a program.
        stages: steps that are copied ahead.
        parts: parts of the contracted axis that are summed by different programs, so that there are enough programs if
            rows are few.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1


def tiling(rows: int, groups: int, columns: int, transpose: bool) -> MXFP4TritonTiling:
    """Sizes for P rows in all and a product with ``columns`` columns."""
    if transpose:
        return MXFP4TritonTiling(64, 128, 64, 4, 3)
    height = next(h for h in (16, 32, 64) if h == 64 or 2 * rows <= h * groups)
    if max(groups, rows // height) * columns < _PROGRAMS * 128:
        return MXFP4TritonTiling(height, 64, 128, 4, 4, 3)
    return MXFP4TritonTiling(height, 128, 128, 4, 3)


def matmul(
    x: BFloat16[Array, "P A"],
    weight: MXFP4,
    expert: Int[Array, " U"] | None,
    group_offsets: Int[Array, " U"],
    group_sizes: Int[Array, " U"],
    transpose: bool,
    interpret: bool = False,
) -> BFloat16[Array, "P Z"]:
    """Multiply each of U groups of rows; arguments as in :func:`moejax.ops.experts.matmul.packed.matmul`."""
    _, m, d = weight.shape
    tile = tiling(len(x), len(group_sizes), d if transpose else m, transpose)
    if len(x) <= tile.rows:
        # no group has more rows than a tile
        group = jnp.arange(len(group_sizes), dtype=jnp.int32)
        table = jnp.stack([group if expert is None else expert, group_offsets, group_sizes])
    else:
        table = tile_table(group_offsets, group_sizes, len(x), tile.rows)
        table = table if expert is None else table.at[0].set(expert[table[0]])
    return _kernel(x if transpose else _rows_in_fragment_order(x), weight, table, tile, transpose, interpret)


# jitted, so that layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("t", "transpose", "interpret"))
def _kernel(x: Array, weight: MXFP4, table: Array, t: MXFP4TritonTiling, transpose: bool, interpret: bool) -> Array:
    # imported late: the import takes a quarter of a second, and only a GPU that takes the kernel needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    _, m, d = weight.shape
    depth, width = (m, d) if transpose else (d, m)
    steps = -(-depth // (t.depth * t.parts))

    def region(lead: tuple, i: Array, j: Array, ends: tuple) -> tuple[tuple, Array]:
        """The index of rows ``i`` and columns ``j``, and a mask of those before ``ends``."""
        return (*lead, i[:, None], j[None]), (i < ends[0])[:, None] & (j < ends[1])[None]

    def body(x, blocks, scales, table, y):
        column, tile, part = (pl.program_id(n) for n in range(3))

        # unused tiles of the table have no rows
        @pl.when(table[2, tile] > 0)
        def _tile():
            expert, start, tile_rows = (table[n, tile] for n in range(3))
            rows = start + jnp.arange(t.rows)

            def read(array: Any, *where: Any) -> Array:
                index, inside = region(*where)
                return gpu.load(array.at[index], mask=inside, other=0)

            def read_weights(array: Any, step: Array | int, values: int) -> Array:
                """A step's part of an array that has one entry for so many ``values``."""
                along, across = (step, t.depth), (column, t.columns)
                (i, height), (j, length) = (along, across) if transpose else (across, along)
                length //= values
                ends = (m, d // values)
                return read(array, (expert,), i * height + jnp.arange(height), j * length + jnp.arange(length), ends)

            def step(i: Array, carry: tuple) -> tuple:
                sums, scale = carry
                k = part * steps + i
                # scales of the next step: they are too narrow for Triton to copy them ahead
                next_scale = read_weights(scales, k + 1, BLOCK)
                halves = _unpack(read_weights(blocks, k, 2), scale, interpret)
                xs = read(x, (), rows, k * t.depth + jnp.arange(t.depth), (start + tile_rows, depth))
                return (_add_matrix if transpose else _add_transposed)(sums, xs, halves), next_scale

            zero = jnp.zeros((t.rows, t.columns // 2) if transpose else (t.columns, t.rows), jnp.float32)
            carry = (zero, zero) if transpose else zero, read_weights(scales, part * steps, BLOCK)
            sums, _ = lax.fori_loop(0, steps, step, carry)
            product = _interleaved(*(s.astype(y.dtype) for s in sums)) if transpose else sums.T.astype(y.dtype)
            columns = column * t.columns + jnp.arange(t.columns)
            index, inside = region((part,), rows, columns, (start + tile_rows, width))
            gpu.store(y.at[index], product, mask=inside)

    # the name of the kernel in a profile
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


def _add_transposed(sums: Array, x: Array, halves: tuple[Array, Array]) -> Array:
    """``sums + W x^T``, of shape [columns, rows], where ``x`` is in the order of :func:`_rows_in_fragment_order`."""
    weight = _in_fragment_order(_interleaved(*halves))
    return sums + lax.dot_general(weight, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _add_matrix(sums: tuple[Array, Array], x: Array, halves: tuple[Array, Array]) -> tuple[Array, ...]:
    """``sums + x W`` for the even columns of ``W`` and for the odd ones, each of shape [rows, columns / 2]."""
    return tuple(s + jnp.dot(x, w, preferred_element_type=jnp.float32) for s, w in zip(sums, halves, strict=True))


def _in_fragment_order(weight: Float[Array, "X D"]) -> Float[Array, "X D"]:
    """Reorder columns within blocks of 32, so that each thread unpacks exactly the weights that it multiplies.

    Of 16 columns that the matrix unit contracts, a thread at position q of its quad holds the pairs 2q and 2q + 8 (a
    *fragment*; PTX ISA, "Matrix Fragments"). The thread reads the bytes 4q to 4q + 3 of a block of packed weights. The
    low halves become these pairs for the first 16 columns of the block, the high halves for the other 16.
    """
    # quad position, pair, entry of the pair, half of the byte -> half, pair, quad position, entry of the pair
    return weight.reshape(len(weight), -1, 4, 2, 2, 2).transpose(0, 1, 5, 3, 2, 4).reshape(weight.shape)


def _rows_in_fragment_order(x: Float[Array, "P D"]) -> Float[Array, "P D"]:
    """The same order for rows, outside of the kernel. It is a gather, which XLA fuses into what computes the rows."""
    block = np.arange(BLOCK).reshape(4, 2, 2, 2).transpose(3, 1, 0, 2).ravel()
    index = np.arange(0, x.shape[1], BLOCK)[:, None] + block
    return x.at[:, index.ravel().astype(np.uint32)].get(mode="promise_in_bounds", unique_indices=True)


def _interleaved(even: Float[Array, "X Y"], odd: Float[Array, "X Y"]) -> Float[Array, "X 2*Y"]:
    """Columns of ``even`` and ``odd`` in turn."""
    return jnp.concatenate([even[..., None], odd[..., None]], -1).reshape(len(even), -1)


def _unpack(
    pairs: UInt8[Array, "X Y"], scales: UInt8[Array, "X U"], interpret: bool
) -> tuple[BFloat16[Array, "X Y"], BFloat16[Array, "X Y"]]:
    """The values in the low halves and in the high halves of bytes; each block of 16 bytes has a scale."""
    # powers of two as bfloat16. The power of scale 0 is a subnormal number, the power of scale 255 is infinite.
    powers = lax.bitcast_convert_type(jnp.maximum(scales.astype(jnp.int16) << 7, jnp.int16(0x40)), jnp.bfloat16)
    powers = jnp.broadcast_to(powers[..., None], (*powers.shape, BLOCK // 2)).reshape(pairs.shape)
    decode = _decode_plain if interpret else _decode_ptx
    return decode(pairs, False) * powers, decode(pairs, True) * powers


def _decode_plain(pairs: UInt8[Array, "X Y"], high: bool) -> BFloat16[Array, "X Y"]:
    """The same as :func:`_decode_ptx`, for Pallas's interpreter, which cannot run PTX."""
    code = (pairs >> 4 if high else pairs & 15).astype(jnp.int32)
    size = code & 7
    twice = jnp.where(size < 2, size, (2 | size & 1) << jnp.maximum((size >> 1) - 1, 0))
    return jnp.where(code < 8, twice, -twice).astype(jnp.bfloat16) * jnp.bfloat16(0.5)


def _decode_ptx(pairs: UInt8[Array, "X Y"], high: bool) -> BFloat16[Array, "X Y"]:
    """The four-bit floats in the low or high halves of bytes, four bytes at a time, with two instructions a value.

    The bits of exponent and mantissa are moved to the lowest bits of bfloat16's exponent and the highest bits of its
    mantissa. The result is the number times 2^-126, also for the subnormal code, because the multiplication by 2^126
    that follows handles subnormal numbers.
    """
    from jax.experimental.pallas import triton as gpu

    sign, size = ("mov.b32 s, p;", "shr.b32 v, p, 6;") if high else ("shl.b32 s, p, 4;", "shr.b32 v, p, 2;")
    # put each byte into the upper half of 16 bits, join sign and size, multiply by 2^126 and add -0
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
