"""What single threads do in :mod:`moejax.ops.experts.hopper_packed`: the steps between shared memory and matrix unit.

Pallas has no words for them, so they are written in MLIR and PTX. Of a tile's 256 columns either of two warpgroups
multiplies 128, as the rows of two matrices of 64. A thread is warp ``w`` (0 to 3) of its warpgroup, and in it quad
``r`` (0 to 7) and place ``q`` (0 to 3): of its warpgroup's columns it has ``32 w + 4 r + i`` for ``i`` from 0 to 3. The
matrix unit takes the first two as rows ``16 w + r`` and ``16 w + r + 8`` of one matrix, the others as those of the
second (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", register fragments of A and D). Of 16 contracted
entries a thread holds pairs ``2 q`` and ``2 q + 8`` of each.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from moejax.ops.mxfp4 import BLOCK

DEPTH = 128
"""Of the contracted axis what one step multiplies: two halves of four times 16."""

COLUMNS = 256
"""Of a tile; 128 for each warpgroup."""

SHIFT = 32
"""Values are unpacked as if scales were ``2 ** SHIFT`` smaller, and sums are multiplied by that in the end."""

Values = tuple[Any, Any]
"""Of both matrices of a warpgroup, each ``[64, 64]``."""

_ONE = gpu.Layout.WG_SPLAT
_POWERS = gpu.Layout.WG_STRIDED((4 * 128,), vec_size=1)
_WORDS = gpu.Layout.WG_STRIDED((16 * 128,), vec_size=1)
_MATRIX = gpu.Layout.WGMMA
_HALF = (64, 64)

_PITCH = 256 + 4
"""From one block's powers to the next one's in shared memory, such that eight blocks stand in different banks."""

_SIZE = {False: 4, True: 2}
"""Bytes of a power, contracting ``d`` and ``m``."""

POWERS = {transpose: 8 * _PITCH * size // 4 for transpose, size in _SIZE.items()}
"""Words of a stage's powers."""

SWIZZLE = (gpu.SwizzleTransform(128),)
"""Of packed weights in shared memory, 128 bytes a row: chunk ``c`` of 16 bytes stands at ``c ^ row % 8``."""

_FOUR_PAIRS = "shr.b32 w, $4, 8;" + "".join(
    f"and.b32 v, {word}, {0x000F000F << low}; mul.lo.u32 v, v, {(1 << 6 | 1 << 12) >> low}; and.b32 v, v, 0x81C081C0;"
    f"mul.rn.bf16x2 ${n}, v, $5;"
    for n, (word, low) in enumerate([("$4", 0), ("$4", 4), ("w", 0), ("w", 4)])
)
"""A multiplication copies an entry to two places: there its sign is where bfloat16 has it, here the others are."""


def _inline(**types: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of MLIR values one of Pallas; its first argument is the kernel's context."""
    return gpu.inline_mgpu(**types)


def ask(m: int, d: int) -> Callable[..., Any]:
    """``(scales, expert, row, block)``: scales from global memory, of the copying warpgroup.

    Those of 256 rows from ``row`` on, of eight blocks from ``block`` on, whose weights are copied as one: a thread has
    one of the blocks, of every fourth of 64 rows.
    """
    pitch = d // BLOCK

    @_inline(
        arg_types=(gpu.RefType(), *[_ONE] * 3),
        return_type=gpu.ShapeDtypeStruct((16 * 128,), jnp.int32, layout=_WORDS),
    )
    def load(_, scales, *where):
        expert, first, block = map(_scalar, where)
        row, own = _asked()
        base = _at(utils.memref_ptr(scales), arith.muli(_wide(expert), _i64(m * pitch)))
        found = []
        for n in range(16):
            # what is multiplied beyond the ends is zero
            there = arith.minui(_sum(first, row, _i32(4 * n)), _i32(m - 1))
            there = _at(base, _sum(_times(there, pitch), arith.minui(_sum(block, own), _i32(pitch - 1))))
            # here and not where it is used, which is when it has come
            found.append(_ptx("ld.global.u8 $0, [$1];", [llvm.ptrtoint(_integer(64), there)], "l", lasting=True))
        return _integers(found, _WORDS.to_mgpu())

    return load


def put(transpose: bool) -> Callable[..., None]:
    """``(scales, powers)``: what :func:`ask` loaded to shared memory, as exponents of bfloat16, block by block.

    Contracting ``d``, one serves both values of a pair, and stands there twice; contracting ``m``, those of two rows
    are a pair as they stand.
    """
    size = _SIZE[transpose]

    @_inline(arg_types=(_WORDS, gpu.RefType()), return_type=None)
    def write(_, scales, powers):
        row, own = _asked()
        base = _at(utils.memref_ptr(powers), _sum(_times(own, _PITCH * size), _times(row, size)))
        # the largest is infinity
        power = f"add.u32 $0, $1, {126 - SHIFT}; min.u32 $0, $0, 255; shl.b32 $0, $0, 7; prmt.b32 $0, $0, 0, 0x1010;"
        for n, scale in enumerate(scales.registers.flat):
            two = _ptx(power, [llvm.bitcast(_integer(32), scale)])
            llvm.store(two if size == 4 else arith.trunci(_integer(16), two), _at(base, _i32(4 * n * size)))

    return write


@_inline(
    arg_types=(gpu.RefType(), _ONE, _ONE),
    return_type=gpu.ShapeDtypeStruct((4 * 128,), jnp.int32, layout=_POWERS),
)
def powers_of_columns(_, powers, group, odd):
    """``(powers, group, odd)``: of a thread's block of each column, where :func:`words` reads its weights."""
    w, r, q = _place()
    block = _times(_sum(q, _times(_scalar(odd), 4)), _PITCH * 4)
    there = _at(utils.memref_ptr(powers), _sum(block, _times(_columns(_scalar(group), w, r), 4)))
    four = llvm.load(ir.VectorType.get((4,), _integer(32)), there, alignment=16)
    return _integers([llvm.extractelement(four, _i32(n)) for n in range(4)], _POWERS.to_mgpu())


@_inline(
    arg_types=(gpu.RefType(SWIZZLE), _ONE, _ONE),
    return_type=gpu.ShapeDtypeStruct((16 * 128,), jnp.int32, layout=_WORDS),
)
def words(_, packed, group, odd):
    """``(packed, group, odd)``: a thread's block of each column, for a step of even or odd number contracting ``d``."""
    group, odd = _scalar(group), _scalar(odd)
    w, r, q = _place()
    base, chunk = utils.memref_ptr(packed), _sum(q, _times(odd, 4))
    found = []
    for i in range(4):
        row = _sum(_columns(group, w, r), _i32(i))
        place = arith.xori(chunk, arith.andi(row, _i32(7)))
        four = llvm.load(ir.VectorType.get((4,), _integer(32)), _at(base, _bytes(row, place)), alignment=16)
        found += [llvm.extractelement(four, _i32(n)) for n in range(4)]
    return _integers(found, _WORDS.to_mgpu())


def values(half: int, transpose: bool) -> Callable[..., Values]:
    """``(packed, powers, group, odd)``: weights of half a step as the matrix unit wants them, times ``2 ** -SHIFT``.

    The first two are what :func:`words` and :func:`powers_of_columns` give or, contracting ``m``, shared memory, read
    here.
    """
    sources = (gpu.RefType(SWIZZLE), gpu.RefType()) if transpose else (_WORDS, _POWERS)
    matrix = gpu.ShapeDtypeStruct(_HALF, jnp.bfloat16, layout=_MATRIX)

    @_inline(arg_types=(*sources, _ONE, _ONE), return_type=(matrix, matrix))
    def unpack(_, packed, powers, group, odd):
        read = _by_rows if transpose else _by_columns
        return tuple(map(_fragments, read(half, packed, powers, _scalar(group), _scalar(odd))))

    return unpack


def _by_columns(half: int, packed: Any, powers: Any, group: Any, odd: Any) -> tuple[dict, dict]:
    """Each word has eight entries of one column; entries n and n + 4 are a pair."""
    del group, odd
    found = {}, {}
    for i in range(4):
        power = llvm.bitcast(_integer(32), powers.registers.flat[i])
        for n in range(2):
            word = llvm.bitcast(_integer(32), packed.registers.flat[4 * i + 2 * half + n])
            for pair, value in enumerate(_four_pairs(word, power)):
                found[i // 2][4 * n + pair, i % 2] = value
    return found


def _by_rows(half: int, packed: Any, powers: Any, group: Any, odd: Any) -> tuple[dict, dict]:
    """Two bytes of a row have an entry of each of a thread's columns; those of two rows are pairs."""
    w, r, q = _place()
    base, chunk = utils.memref_ptr(packed), _sum(_times(group, 4), w)
    row = _sum(_times(q, 2), _times(odd, DEPTH))
    own = _at(utils.memref_ptr(powers), _times(_sum(_times(chunk, _PITCH), row), 2))
    found = {}, {}
    for s in range(4 * half, 4 * half + 4):
        for p in range(2):
            power = llvm.load(_integer(32), _at(own, _i32(2 * (16 * s + 8 * p))), alignment=4)
            two = []
            for o in range(2):
                low = _sum(_times(q, 2), _i32(o))
                place = _sum(_bytes(low, arith.xori(chunk, low)), _times(r, 2), _times(odd, 128 * DEPTH))
                there = _at(_at(base, place), _i32(128 * (16 * s + 8 * p)))
                two.append(arith.extui(_integer(32), llvm.load(_integer(16), there, alignment=2)))
            pairs = _four_pairs(_ptx("prmt.b32 $0, $1, $2, 0x5410;", two), power)
            for i, value in enumerate(pairs):
                found[i // 2][2 * (s % 4) + p, i % 2] = value
    return found


@_inline(return_type=(gpu.ShapeDtypeStruct(_HALF, jnp.bfloat16, layout=_MATRIX),) * 2)
def zeros(_):
    """Weights that are zero."""
    return tuple(_fragments({(n, h): _i32(0) for n in range(8) for h in range(2)}) for _ in range(2))


@_inline(arg_types=(_MATRIX, _MATRIX, _ONE), return_type=None)
def keep(_, first, second, rows):
    """``(*values, rows)``: have registers with weights stay what they are until here.

    The matrix unit reads them while the program goes on, and the compiler, to which they are free once the product is
    started, would reuse them. So here is a store of them that never happens, since no tile has less than no rows. Each
    stores four together in the order of one instruction's operand: what the instruction reads is a copy that JAX makes
    of these values (``wgmma_fence``), and the assembler gives both the same registers.
    """
    kept = [llvm.bitcast(_integer(32), v) for v in (*first.registers.flat, *second.registers.flat)]
    fours = (", ".join(f"${4 * n + k}" for k in range(4)) for n in range(len(kept) // 4))
    stores = "".join(f"st.shared.v4.b32 [a], {{{four}}};" for four in fours)
    test = f"mov.b32 a, 0; setp.ge.s32 p, ${len(kept)}, 0; @p bra KEPT;"
    _do(f"{{ .reg .pred p; .reg .b32 a; {test} {stores} KEPT: }}", "r," * len(kept) + "r", [*kept, _scalar(rows)])


def store(width: int) -> Callable[..., None]:
    """``(y, *sums, start, rows, column, group)``: a tile's rows, each thread four columns of a quarter of them."""

    @_inline(arg_types=(gpu.RefType(), _MATRIX, _MATRIX, *[_ONE] * 4), return_type=None)
    def write(_, y, first, second, *where):
        start, rows, column, group = map(_scalar, where)
        w, r, q = _place()
        column = _sum(column, _columns(group, w, r))
        rows = arith.select(arith.cmpi(arith.CmpIPredicate.ult, column, _i32(width)), rows, _i32(0))
        row = _times(q, 2)
        entry = arith.addi(arith.muli(_wide(_sum(start, row)), _i64(width)), _wide(column))
        base = _at(utils.memref_ptr(y), arith.muli(entry, _i64(2)))
        back = arith.constant(ir.F32Type.get(), 2.0**SHIFT)
        for n in range(first.shape[1] // 8):
            for o in range(2):
                sums = [s.registers[0, n, 0, 0, h, 0, 0, 0, 0] for s in (first, second) for h in range(2)]
                sums = [arith.mulf(llvm.extractelement(s, _i32(o)), back) for s in sums]
                two = [_ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", sums[k : k + 2], "f") for k in (0, 2)]
                inside = arith.cmpi(arith.CmpIPredicate.slt, _sum(row, _i32(8 * n + o)), rows)
                there = llvm.ptrtoint(_integer(64), _at(base, _i64((8 * n + o) * width * 2)))
                code = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }"
                _do(code, "l,r,r,r", [there, *two, arith.extui(_integer(32), inside)])

    return write


def _four_pairs(word: Any, power: Any) -> list:
    """Entries n and n + 4 of the eight four-bit floats in a word, for n from 0 to 3, times powers of two.

    Exponent and mantissa go where bfloat16 has the lowest bits of its exponent and the highest of its mantissa: that
    is the number times 2^-126, for the subnormal one too, which the multiplication respects.
    """
    four = llvm.StructType.get_literal([_integer(32)] * 4)
    code = f"{{ .reg .b32 v, w; {_FOUR_PAIRS} }}"
    found: Any = llvm.inline_asm(four, [word, power], code, "=&r,=&r,=&r,=&r,r,r", asm_dialect=0)
    return [llvm.extractvalue(_integer(32), found, [n]) for n in range(4)]


def _fragments(pairs: dict[tuple[int, int], Any]) -> Any:
    """A matrix of ``[64, 64]`` of what a thread holds: pairs ``(n, h)`` of 8 columns and of rows r or r + 8."""
    found = np.empty(fragments.WGMMA_LAYOUT.registers_shape(_HALF), object)
    for (n, h), pair in pairs.items():
        found[0, n, 0, 0, h, 0, 0, 0, 0] = llvm.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), pair)
    return fragments.FragmentedArray(_registers=found, _layout=fragments.WGMMA_LAYOUT, _is_signed=None)


def _integers(found: Iterable, layout: Any) -> Any:
    each = [llvm.bitcast(ir.VectorType.get((1,), _integer(32)), i) for i in found]
    registers = np.empty(layout.registers_shape((len(each) * 128,)), object)
    assert math.prod(registers.shape) == len(each)
    registers.flat[:] = each
    return fragments.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _place() -> tuple[Any, Any, Any]:
    """Warp, quad and place in it."""
    thread = arith.andi(utils.thread_idx(), _i32(127))
    lane = arith.andi(thread, _i32(31))
    return arith.shrui(thread, _i32(5)), arith.shrui(lane, _i32(2)), arith.andi(lane, _i32(3))


def _asked() -> tuple[Any, Any]:
    """Of scales copied together, a thread's first row and its block."""
    thread = arith.andi(utils.thread_idx(), _i32(127))
    warp, lane = arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))
    return _sum(_times(warp, 64), arith.shrui(lane, _i32(3))), arith.andi(lane, _i32(7))


def _columns(group: Any, w: Any, r: Any) -> Any:
    """The first of a thread's columns in a tile."""
    return _sum(_times(group, COLUMNS // 2), _times(w, 32), _times(r, 4))


def _bytes(row: Any, chunk: Any) -> Any:
    return _sum(_times(row, 128), _times(chunk, 16))


def _ptx(code: str, operands: list, kind: str = "r", lasting: bool = False) -> Any:
    """A 32-bit integer computed from operands of a kind. One that is ``lasting`` stays where it is."""
    # what is written before all operands are read needs a register of its own
    constraints = "=&r" + f",{kind}" * len(operands)
    code = code if code.startswith("{") else f"{{ {code} }}"
    return llvm.inline_asm(_integer(32), operands, code, constraints, has_side_effects=lasting, asm_dialect=0)


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
    """So many bytes further."""
    offset = _wide(offset) if offset.type == _integer(32) else offset
    # dynamic indices are marked by the smallest integer
    return llvm.getelementptr(pointer.type, pointer, [offset], [-(2**31)], _integer(8), llvm.GEPNoWrapFlags.none)
