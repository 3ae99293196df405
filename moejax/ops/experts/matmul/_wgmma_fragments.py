"""The work of single threads in :mod:`moejax.ops.experts.matmul._mxfp4_hopper_kernel`.

They load packed weights and scales, unpack weights to the registers of the matrix unit, and store its results.

Pallas cannot express these steps, so they are written in MLIR and PTX. Each of two warpgroups multiplies 128 of a
tile's 256 columns, as the rows of two matrices of 64 rows. The names of a thread, as in the code:

- ``w`` (0 to 3): its warp in the warpgroup,
- ``r`` (0 to 7): its quad in the warp,
- ``q`` (0 to 3): its position in the quad.

A thread holds the columns ``32 w + 4 r + i`` of its warpgroup, for ``i`` from 0 to 3. The matrix unit takes the first
two as rows ``16 w + r`` and ``16 w + r + 8`` of the first matrix, and the other two as the same rows of the second
matrix (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", register fragments of A and D). Of 16 contracted
entries, a thread holds the pairs that begin at ``2 q`` and ``2 q + 8``, of both rows::

    contracted   0 1   2 3   4 5   6 7   8 9  10 11  12 13  14 15
    row r        q=0   q=1   q=2   q=3   q=0   q=1    q=2    q=3
    row r + 8    q=0   q=1   q=2   q=3   q=0   q=1    q=2    q=3

How the two buffers are laid out in shared memory:

=======  ====================  ======================================================================================
buffer   one stage             layout
=======  ====================  ======================================================================================
packed   32768 bytes           256 rows of 128 bytes; the 16-byte chunk ``c`` of a row is at ``c ^ row % 8``
powers   8320 or 4160 bytes    8 blocks of 256 powers, 4 bytes each (2 if ``m`` is contracted), 260 powers apart
=======  ====================  ======================================================================================
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from moejax.ops.mxfp4 import BLOCK

DEPTH = 128
"""Entries of the contracted axis that a step multiplies: two halves of four times 16."""

COLUMNS = 256
"""Columns of a tile; each warpgroup has 128 of them."""

SHIFT = 32
"""Weights are unpacked as if scales were smaller by ``2 ** SHIFT``, and the sums are multiplied by it in the end."""

Weights = tuple[Any, Any]
"""Unpacked weights of the two matrices of a warpgroup, each ``[64, 64]``."""

_ONE = gpu.Layout.WG_SPLAT
_POWERS = gpu.Layout.WG_STRIDED((4 * 128,), vec_size=1)
_WORDS = gpu.Layout.WG_STRIDED((16 * 128,), vec_size=1)
_MATRIX = gpu.Layout.WGMMA
_HALF = (64, 64)

_PITCH = 256 + 4
"""Powers from one block to the next one in shared memory. The 4 put eight blocks into different memory banks."""

_SIZE = {False: 4, True: 2}
"""Bytes of a power, by ``transpose``."""

POWERS = {transpose: 8 * _PITCH * size // 4 for transpose, size in _SIZE.items()}
"""32-bit words of the powers of a stage, by ``transpose``."""

SWIZZLE = (gpu.SwizzleTransform(128),)
"""Layout of packed weights in shared memory, with 128 bytes a row: chunk ``c`` of 16 bytes is at ``c ^ row % 8``."""

_FOUR_PAIRS = "shr.b32 w, $4, 8;" + "".join(
    f"and.b32 v, {word}, {0x000F000F << low}; mul.lo.u32 v, v, {(1 << 6 | 1 << 12) >> low}; and.b32 v, v, 0x81C081C0;"
    f"mul.rn.bf16x2 ${n}, v, $5;"
    for n, (word, low) in enumerate([("$4", 0), ("$4", 4), ("w", 0), ("w", 4)])
)
"""PTX of :func:`_four_pairs`. The integer multiplication copies a four-bit float to two places: one has the sign where
bfloat16 has it, the other has exponent and mantissa in place."""


def _inline(**types: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of MLIR values a function of Pallas; its first argument is the kernel's context."""
    return gpu.inline_mgpu(**types)


# ---- scales --------------------------------------------------------------------------------------------------------


def load_scales(m: int, d: int) -> Callable[..., Any]:
    """A function ``(scales, expert, row, block)`` that loads scales from global memory, for the warpgroup that copies.

    It loads the scales of 256 rows, beginning at ``row``, and eight blocks, beginning at ``block``: the weights that
    one copy brings. A thread gets 16 of them, of one block and of every fourth one of 64 rows.
    """
    pitch = d // BLOCK

    @_inline(
        arg_types=(gpu.RefType(), *[_ONE] * 3),
        return_type=gpu.ShapeDtypeStruct((16 * 128,), jnp.int32, layout=_WORDS),
    )
    def load(_, scales, *where):
        expert, first, block = map(_scalar, where)
        row, thread_block = _scale_position()
        base = _at(utils.memref_ptr(scales), arith.muli(_wide(expert), _i64(m * pitch)))
        loaded = []
        for n in range(16):
            # beyond the ends any scale will do, since the weights there are multiplied by zeros
            clipped = arith.minui(_sum(first, row, _i32(4 * n)), _i32(m - 1))
            address = _at(base, _sum(_times(clipped, pitch), arith.minui(_sum(block, thread_block), _i32(pitch - 1))))
            # requested now: left to the compiler, the load would move to where it is used and be waited for there
            operands = [llvm.ptrtoint(_integer(64), address)]
            loaded.append(_ptx("ld.global.u8 $0, [$1];", operands, "l", in_place=True))
        return _integers(loaded, _WORDS.to_mgpu())

    return load


def store_exponents(transpose: bool) -> Callable[..., None]:
    """A function ``(scales, powers)`` that stores loaded scales to shared memory as powers of two in bfloat16.

    If ``d`` is contracted, both weights of a pair have the same scale, so its power is stored twice. If ``m`` is
    contracted (``transpose``), the powers of two neighbouring rows are a pair as they are.
    """
    size = _SIZE[transpose]

    @_inline(arg_types=(_WORDS, gpu.RefType()), return_type=None)
    def store(_, scales, powers):
        row, thread_block = _scale_position()
        base = _at(utils.memref_ptr(powers), _sum(_times(thread_block, _PITCH * size), _times(row, size)))
        # 255 is the exponent of infinity
        power = f"add.u32 $0, $1, {126 - SHIFT}; min.u32 $0, $0, 255; shl.b32 $0, $0, 7; prmt.b32 $0, $0, 0, 0x1010;"
        for n, scale in enumerate(scales.registers.flat):
            pair = _ptx(power, [llvm.bitcast(_integer(32), scale)])
            llvm.store(pair if size == 4 else arith.trunci(_integer(16), pair), _at(base, _i32(4 * n * size)))

    return store


@_inline(
    arg_types=(gpu.RefType(), _ONE, _ONE),
    return_type=gpu.ShapeDtypeStruct((4 * 128,), jnp.int32, layout=_POWERS),
)
def load_powers(_, powers, group, odd):
    """``(powers, group, odd)``: the power of each of a thread's columns, for the weights of :func:`load_packed`."""
    w, r, q = _thread()
    block = _times(_sum(q, _times(_scalar(odd), 4)), _PITCH * 4)
    address = _at(utils.memref_ptr(powers), _sum(block, _times(_columns(_scalar(group), w, r), 4)))
    four = llvm.load(ir.VectorType.get((4,), _integer(32)), address, alignment=16)
    return _integers([llvm.extractelement(four, _i32(n)) for n in range(4)], _POWERS.to_mgpu())


# ---- weights -------------------------------------------------------------------------------------------------------


@_inline(
    arg_types=(gpu.RefType(SWIZZLE), _ONE, _ONE),
    return_type=gpu.ShapeDtypeStruct((16 * 128,), jnp.int32, layout=_WORDS),
)
def load_packed(_, packed, group, odd):
    """``(packed, group, odd)``: the four words of a thread's block of each of its columns.

    For a product that contracts ``d``. ``odd`` is 1 in the second step of a pair.
    """
    group, odd = _scalar(group), _scalar(odd)
    w, r, q = _thread()
    base, chunk = utils.memref_ptr(packed), _sum(q, _times(odd, 4))
    words = []
    for i in range(4):
        row = _sum(_columns(group, w, r), _i32(i))
        swizzled = arith.xori(chunk, arith.andi(row, _i32(7)))
        four = llvm.load(ir.VectorType.get((4,), _integer(32)), _at(base, _bytes(row, swizzled)), alignment=16)
        words += [llvm.extractelement(four, _i32(n)) for n in range(4)]
    return _integers(words, _WORDS.to_mgpu())


def unpack_weights(half: int, transpose: bool) -> Callable[..., Weights]:
    """A function ``(packed, powers, group, odd)``: the weights of half a step as fragments, times ``2 ** -SHIFT``.

    ``packed`` and ``powers`` are the results of :func:`load_packed` and :func:`load_powers`. If ``m`` is contracted
    (``transpose``), they are shared memory, which is read here.
    """
    sources = (gpu.RefType(SWIZZLE), gpu.RefType()) if transpose else (_WORDS, _POWERS)
    matrix = gpu.ShapeDtypeStruct(_HALF, jnp.bfloat16, layout=_MATRIX)

    @_inline(arg_types=(*sources, _ONE, _ONE), return_type=(matrix, matrix))
    def unpack(_, packed, powers, group, odd):
        read = _pairs_by_rows if transpose else _pairs_by_columns
        return tuple(map(_fragment, read(half, packed, powers, _scalar(group), _scalar(odd))))

    return unpack


def _pairs_by_columns(half: int, packed: Any, powers: Any, group: Any, odd: Any) -> tuple[dict, dict]:
    """Unpack for a product that contracts ``d``: a word has eight entries of a column; n and n + 4 are a pair."""
    del group, odd
    pairs = {}, {}
    for i in range(4):
        power = llvm.bitcast(_integer(32), powers.registers.flat[i])
        for n in range(2):
            word = llvm.bitcast(_integer(32), packed.registers.flat[4 * i + 2 * half + n])
            for k, pair in enumerate(_four_pairs(word, power)):
                pairs[i // 2][4 * n + k, i % 2] = pair
    return pairs


def _pairs_by_rows(half: int, packed: Any, powers: Any, group: Any, odd: Any) -> tuple[dict, dict]:
    """Unpack for a product that contracts ``m``: two bytes of a row hold an entry of each of a thread's four columns.

    The entries of two neighbouring rows are a pair.
    """
    w, r, q = _thread()
    base, chunk = utils.memref_ptr(packed), _sum(_times(group, 4), w)
    row = _sum(_times(q, 2), _times(odd, DEPTH))
    thread_powers = _at(utils.memref_ptr(powers), _times(_sum(_times(chunk, _PITCH), row), 2))
    pairs = {}, {}
    for s in range(4 * half, 4 * half + 4):
        for p in range(2):
            power = llvm.load(_integer(32), _at(thread_powers, _i32(2 * (16 * s + 8 * p))), alignment=4)
            two_rows = []
            for o in range(2):
                low = _sum(_times(q, 2), _i32(o))
                offset = _sum(_bytes(low, arith.xori(chunk, low)), _times(r, 2), _times(odd, 128 * DEPTH))
                address = _at(_at(base, offset), _i32(128 * (16 * s + 8 * p)))
                two_rows.append(arith.extui(_integer(32), llvm.load(_integer(16), address, alignment=2)))
            unpacked = _four_pairs(_ptx("prmt.b32 $0, $1, $2, 0x5410;", two_rows), power)
            for i, pair in enumerate(unpacked):
                pairs[i // 2][2 * (s % 4) + p, i % 2] = pair
    return pairs


@_inline(return_type=(gpu.ShapeDtypeStruct(_HALF, jnp.bfloat16, layout=_MATRIX),) * 2)
def zeros(_):
    """Weights that are zero."""
    return tuple(_fragment({(n, h): _i32(0) for n in range(8) for h in range(2)}) for _ in range(2))


@_inline(arg_types=(_MATRIX, _MATRIX, _ONE), return_type=None)
def hold_registers(_, first, second, rows):
    """``(*weights, rows)``: keep the compiler from reusing the registers of weights before this point.

    The matrix unit reads registers while the program goes on. To the compiler they are free as soon as the product has
    started, and it would reuse them. So this is a store of these registers that never runs, because a tile never has a
    negative number of rows. It stores four registers at a time, in the order of an instruction's operand: the
    instruction reads a copy that JAX makes of these values (``wgmma_fence``), and in this form the assembler assigns
    the same registers to the copy.
    """
    held = [llvm.bitcast(_integer(32), v) for v in (*first.registers.flat, *second.registers.flat)]
    fours = (", ".join(f"${4 * n + k}" for k in range(4)) for n in range(len(held) // 4))
    stores = "".join(f"st.shared.v4.b32 [a], {{{four}}};" for four in fours)
    test = f"mov.b32 a, 0; setp.ge.s32 p, ${len(held)}, 0; @p bra KEPT;"
    _do(f"{{ .reg .pred p; .reg .b32 a; {test} {stores} KEPT: }}", "r," * len(held) + "r", [*held, _scalar(rows)])


# ---- the result ----------------------------------------------------------------------------------------------------


def store_tile(width: int) -> Callable[..., None]:
    """A function ``(y, *sums, start, rows, column, group)`` that stores a warpgroup's part of a tile to global memory.

    Each thread stores four neighbouring columns of a quarter of the rows. ``width`` is the number of columns of ``y``.
    """

    @_inline(arg_types=(gpu.RefType(), _MATRIX, _MATRIX, *[_ONE] * 4), return_type=None)
    def store(_, y, first, second, *where):
        start, rows, column, group = map(_scalar, where)
        w, r, q = _thread()
        column = _sum(column, _columns(group, w, r))
        rows = arith.select(arith.cmpi(arith.CmpIPredicate.ult, column, _i32(width)), rows, _i32(0))
        row = _times(q, 2)
        entry = arith.addi(arith.muli(_wide(_sum(start, row)), _i64(width)), _wide(column))
        base = _at(utils.memref_ptr(y), arith.muli(entry, _i64(2)))
        unshift = arith.constant(ir.F32Type.get(), 2.0**SHIFT)
        for n in range(first.shape[1] // 8):
            for o in range(2):
                sums = [s.registers[0, n, 0, 0, h, 0, 0, 0, 0] for s in (first, second) for h in range(2)]
                sums = [arith.mulf(llvm.extractelement(s, _i32(o)), unshift) for s in sums]
                pairs = [_ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", sums[k : k + 2], "f") for k in (0, 2)]
                inside = arith.cmpi(arith.CmpIPredicate.slt, _sum(row, _i32(8 * n + o)), rows)
                address = llvm.ptrtoint(_integer(64), _at(base, _i64((8 * n + o) * width * 2)))
                code = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }"
                _do(code, "l,r,r,r", [address, *pairs, arith.extui(_integer(32), inside)])

    return store


# ---- words and fragments -------------------------------------------------------------------------------------------


def _four_pairs(word: Any, power: Any) -> list:
    """For n from 0 to 3 the entries n and n + 4 of the eight four-bit floats in a word, times powers of two.

    The bits of exponent and mantissa are moved to the lowest bits of bfloat16's exponent and the highest bits of its
    mantissa. This is the number times 2^-126, also for the subnormal code, because the multiplication by the power
    handles subnormal numbers.
    """
    four = llvm.StructType.get_literal([_integer(32)] * 4)
    code = f"{{ .reg .b32 v, w; {_FOUR_PAIRS} }}"
    pairs: Any = llvm.inline_asm(four, [word, power], code, "=&r,=&r,=&r,=&r,r,r", asm_dialect=0)
    return [llvm.extractvalue(_integer(32), pairs, [n]) for n in range(4)]


def _fragment(pairs: dict[tuple[int, int], Any]) -> Any:
    """A matrix ``[64, 64]`` from a thread's pairs: key ``(n, h)`` is for columns 8n to 8n + 7 and row ``r + 8 h``."""
    registers = np.empty(fragmented_array.WGMMA_LAYOUT.registers_shape(_HALF), object)
    for (n, h), pair in pairs.items():
        registers[0, n, 0, 0, h, 0, 0, 0, 0] = llvm.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), pair)
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
    )


def _integers(integers: Iterable, layout: Any) -> Any:
    """An array of integers with that layout, from a thread's 32-bit integers."""
    each = [llvm.bitcast(ir.VectorType.get((1,), _integer(32)), i) for i in integers]
    registers = np.empty(layout.registers_shape((len(each) * 128,)), object)
    assert math.prod(registers.shape) == len(each)
    registers.flat[:] = each
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


# ---- where a thread is ---------------------------------------------------------------------------------------------


def _thread() -> tuple[Any, Any, Any]:
    """The thread's warp w, quad r and position q."""
    thread = arith.andi(utils.thread_idx(), _i32(127))
    lane = arith.andi(thread, _i32(31))
    return arith.shrui(thread, _i32(5)), arith.shrui(lane, _i32(2)), arith.andi(lane, _i32(3))


def _scale_position() -> tuple[Any, Any]:
    """The thread's first row and its block, among the scales that are loaded together."""
    thread = arith.andi(utils.thread_idx(), _i32(127))
    warp, lane = arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))
    return _sum(_times(warp, 64), arith.shrui(lane, _i32(3))), arith.andi(lane, _i32(7))


def _columns(group: Any, w: Any, r: Any) -> Any:
    """The first of a thread's four columns in a tile."""
    return _sum(_times(group, COLUMNS // 2), _times(w, 32), _times(r, 4))


def _bytes(row: Any, chunk: Any) -> Any:
    """The offset of a 16-byte chunk in rows of 128 bytes."""
    return _sum(_times(row, 128), _times(chunk, 16))


# ---- MLIR ----------------------------------------------------------------------------------------------------------


def _ptx(code: str, operands: list, kind: str = "r", in_place: bool = False) -> Any:
    """A 32-bit integer that PTX computes from operands of a kind. If ``in_place``, the compiler must not move it."""
    # early clobber (&): a result that is written before all operands are read needs a register of its own
    constraints = "=&r" + f",{kind}" * len(operands)
    code = code if code.startswith("{") else f"{{ {code} }}"
    return llvm.inline_asm(_integer(32), operands, code, constraints, has_side_effects=in_place, asm_dialect=0)


def _do(code: str, constraints: str, operands: list) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True, asm_dialect=0)


def _scalar(a: Any) -> Any:
    return a.registers.flat[0]


def _integer(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _i32(n: int) -> Any:
    return arith.constant(_integer(32), n)


def _i64(n: int) -> Any:
    return arith.constant(_integer(64), n)


def _wide(n: Any) -> Any:
    return arith.extui(_integer(64), n)


def _times(a: Any, n: int) -> Any:
    return arith.muli(a, _i32(n))


def _sum(a: Any, *others: Any) -> Any:
    for other in others:
        a = arith.addi(a, other)
    return a


def _at(pointer: Any, offset: Any) -> Any:
    """The pointer, moved by a number of bytes."""
    offset = _wide(offset) if offset.type == _integer(32) else offset
    # the smallest integer marks an index that is not a constant
    return llvm.getelementptr(pointer.type, pointer, [offset], [-(2**31)], _integer(8), llvm.GEPNoWrapFlags.none)
