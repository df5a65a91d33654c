"""Instructions that compute registers from registers, one function of NumPy arrays each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import floats
from .floats import Array
from .parser import Instruction
from .values import TYPES, UINT, Type

# Rounding to nearest is the default; `approx` and `full` are computed more exactly than hardware.
_FLOAT_MODS = {"rn", "ftz", "sat", "approx", "full"}


@dataclass(frozen=True)
class Signature:
    """The types of an instruction's results and operands, and its function."""

    results: tuple[Type, ...]
    operands: tuple[Type, ...]
    function: Callable[..., Array | tuple[Array, ...]]


def signature(instruction: Instruction) -> Signature | None:
    """How to compute this instruction, or None if it is not a computation."""
    make = _TABLE.get(instruction.opcode)
    return None if make is None else make(instruction)


def last_type(instruction: Instruction) -> Type:
    """The type that ends the opcode."""
    kind = TYPES.get(instruction.mods[-1]) if instruction.mods else None
    if kind is None:
        raise instruction.unsupported("type")
    return kind


def check_mods(instruction: Instruction, allowed: set[str], ntypes: int = 1) -> set[str]:
    """The modifiers before the types, all of which must be allowed."""
    mods = set(instruction.mods[:-ntypes])
    if mods - allowed:
        raise instruction.unsupported(f"modifiers {sorted(mods - allowed)}")
    return mods


def float_function(
    instruction: Instruction, kind: Type, function: Callable, extra: set[str] | None = None
) -> Callable:
    """Add flushing of subnormals and saturation to a function of floats."""
    mods = check_mods(instruction, _FLOAT_MODS | (extra or set()))
    single = kind.name.startswith("f32")

    def run(*args: Array) -> Array:
        if "ftz" in mods and single:
            args = tuple(floats.flush(arg) for arg in args)
        result = function(*args)
        if "ftz" in mods and single:
            result = floats.flush(np.asarray(result).astype(np.float32, copy=False))
        if "sat" in mods:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)
        return result

    return run if mods & {"ftz", "sat"} else function


def _wide(function: Callable) -> Callable:
    """Compute in float64, for results that are rounded to the type afterwards."""
    return lambda *args: function(*(arg.astype(np.float64) for arg in args))


def _simple(count: int, integer: Callable | None, real: Callable | None) -> Callable:
    """An instruction whose results and operands all have its last type."""

    def make(instruction: Instruction) -> Signature:
        kind = last_type(instruction)
        function = real if kind.kind == "f" else integer
        if function is None or len(instruction.operands) != count + 1:
            raise instruction.unsupported()
        if kind.kind == "f":
            function = float_function(instruction, kind, function)
        else:
            check_mods(instruction, set())
        return Signature((kind,), (kind,) * count, function)

    return make


def _extremum(integer: Callable, real: Callable) -> Callable:
    def make(instruction: Instruction) -> Signature:
        kind = last_type(instruction)
        if kind.kind != "f":
            check_mods(instruction, set())
            return Signature((kind,), (kind, kind), integer)
        mods = check_mods(instruction, {"ftz", "NaN"})

        def function(a: Array, b: Array) -> Array:
            result = real(a, b)
            return np.where(np.isnan(a) | np.isnan(b), np.nan, result) if "NaN" in mods else result

        return Signature((kind,), (kind, kind), float_function(instruction, kind, function, mods))

    return make


def _divide(a: Array, b: Array) -> Array:
    """Integer quotient towards zero; all bits set where the divisor is zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, ~b, quotient)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _high(a: Array, b: Array) -> Array:
    """The upper half of the product of two integers."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        shift = wide(8 * a.dtype.itemsize)
        return ((a.astype(wide) * b.astype(wide)) >> shift).astype(a.dtype)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    low = (x & mask) * (y & mask)
    cross = (x >> half) * (y & mask) + (low >> half)
    other = (x & mask) * (y >> half) + (cross & mask)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def _multiply(instruction: Instruction) -> Signature:
    kind = last_type(instruction)
    add = instruction.opcode == "mad"
    if kind.kind == "f":
        if add:
            return _simple(3, None, floats.fma)(instruction)
        return _simple(2, None, np.multiply)(instruction)
    mods = check_mods(instruction, {"lo", "hi", "wide"})
    result = kind
    if "wide" in mods:
        result = TYPES[f"{kind.kind}{16 * kind.nbytes}"]
    dtype = result.decode(np.zeros(1, UINT[result.nbytes])).dtype
    half = _high if "hi" in mods else np.multiply

    def product(a: Array, b: Array) -> Array:
        return half(a.astype(dtype), b.astype(dtype))

    if not add:
        return Signature((result,), (kind, kind), product)
    return Signature((result,), (kind, kind, result), lambda a, b, c: product(a, b) + c)


def _shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    amount = np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count >= bits, a.dtype.type(0), a << amount)


def _shift_right(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), shifted)


def _shift(instruction: Instruction) -> Signature:
    kind = last_type(instruction)
    check_mods(instruction, set())
    function = _shift_left if instruction.opcode == "shl" else _shift_right
    return Signature((kind,), (kind, TYPES["u32"]), function)


def _funnel(instruction: Instruction) -> Signature:
    mods = check_mods(instruction, {"l", "r", "wrap", "clamp"})
    word = TYPES["u32"]

    def function(a: Array, b: Array, count: Array) -> Array:
        count = count & np.uint32(31) if "wrap" in mods else np.minimum(count, np.uint32(32))
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if "r" in mods:
            return (both >> count.astype(np.uint64)).astype(np.uint32)
        return ((both << count.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)

    return Signature((word,), (word, word, word), function)


_COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}
_COMPARE_INTEGERS: dict[str, Callable] = {
    **{name: _COMPARE[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE: dict[str, Callable] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _compare(instruction: Instruction) -> Signature:
    kind, pred = last_type(instruction), TYPES["pred"]
    mods = [mod for mod in instruction.mods[:-1] if mod != "ftz"]
    table = _COMPARE if kind.kind == "f" else _COMPARE_INTEGERS
    if mods[0] not in table or len(mods) > 2 or not set(mods[1:]) <= _COMBINE.keys():
        raise instruction.unsupported()
    compare = table[mods[0]]
    combine = _COMBINE[mods[1]] if len(mods) == 2 else np.logical_and
    if kind.lanes == 2:
        raise instruction.unsupported("packed comparison")
    flush = "ftz" in instruction.mods and kind.name == "f32"

    def function(a: Array, b: Array, *c: Array) -> tuple[Array, Array]:
        if flush:
            a, b = floats.flush(a), floats.flush(b)
        truth = compare(a, b)
        return (combine(truth, *c), combine(~truth, *c)) if c else (truth, ~truth)

    operands = (kind, kind, pred) if len(mods) == 2 else (kind, kind)
    return Signature((pred, pred), operands, function)


def _select(instruction: Instruction) -> Signature:
    kind = last_type(instruction)
    bits = TYPES[f"b{8 * kind.nbytes}"]
    return Signature((bits,), (bits, bits, TYPES["pred"]), lambda a, b, p: np.where(p, a, b))


def _extract(instruction: Instruction) -> Signature:
    """bfe: the bits beyond the source repeat the sign of the field where the type is signed."""
    kind, word = last_type(instruction), TYPES["u32"]
    bits = 8 * kind.nbytes

    def function(a: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        field = _shift_right(a, start)
        unused = np.where(length >= bits, np.uint32(0), np.uint32(bits) - length)
        result = _shift_right(_shift_left(field, unused), unused)
        return np.where(length == 0, a.dtype.type(0), result)

    return Signature((kind,), (kind, word, word), function)


def _insert(instruction: Instruction) -> Signature:
    kind, word = last_type(instruction), TYPES["u32"]

    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        one = b.dtype.type(1)
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        mask = _shift_left(_shift_left(np.full_like(b, one), length) - one, start)
        return (b & ~mask) | (_shift_left(a, start) & mask)

    return Signature((kind,), (kind, kind, word, word), function)


def _permute(instruction: Instruction) -> Signature:
    word = last_type(instruction)
    check_mods(instruction, set())

    def function(a: Array, b: Array, select: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(np.broadcast(a, b, select).shape, np.uint64)
        for i in range(4):
            nibble = (select >> np.uint32(4 * i)).astype(np.uint64)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            result |= byte << np.uint64(8 * i)
        return result.astype(np.uint32)

    return Signature((word,), (word, word, word), function)


def _logic3(instruction: Instruction) -> Signature:
    word = last_type(instruction)
    check_mods(instruction, set())

    def function(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a & b & c)
        for i in range(8):
            if int(table[0]) >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return Signature((word,), (word,) * 4, function)


def _count_bits(instruction: Instruction) -> Signature:
    kind = last_type(instruction)
    check_mods(instruction, set())
    opcode, bits = instruction.opcode, 8 * kind.nbytes

    def function(a: Array) -> Array:
        octets = np.ascontiguousarray(a).view(np.uint8)
        digits = np.unpackbits(octets, bitorder="little").reshape(-1, bits)
        if opcode == "popc":
            return digits.sum(axis=1).astype(np.uint32)
        if opcode == "clz":
            leading = np.argmax(digits[:, ::-1], axis=1)
            return np.where(a == 0, bits, leading).astype(np.uint32)
        packed = np.packbits(np.ascontiguousarray(digits[:, ::-1]), axis=1, bitorder="little")
        return packed.reshape(-1).view(UINT[kind.nbytes])

    return Signature((kind if opcode == "brev" else TYPES["u32"],), (kind,), function)


def _find_bit(instruction: Instruction) -> Signature:
    """bfind: the highest one of an unsigned number, or how far to shift it to the top."""
    kind = last_type(instruction)
    shift = "shiftamt" in check_mods(instruction, {"shiftamt"})
    if kind.kind != "u":
        raise instruction.unsupported("signed numbers")
    bits = 8 * kind.nbytes

    def function(a: Array) -> Array:
        octets = np.ascontiguousarray(a).view(np.uint8)
        digits = np.unpackbits(octets, bitorder="little").reshape(-1, bits)
        leading = np.argmax(digits[:, ::-1], axis=1)
        position = leading if shift else bits - 1 - leading
        return np.where(a == 0, -1, position).astype(np.int32).view(np.uint32)

    return Signature((TYPES["u32"],), (kind,), function)


def _copysign(instruction: Instruction) -> Signature:
    kind = last_type(instruction)
    return Signature((kind,), (kind, kind), lambda sign, size: np.copysign(size, sign))


_TABLE: dict[str, Callable[[Instruction], Signature]] = {
    "add": _simple(2, np.add, np.add),
    "sub": _simple(2, np.subtract, np.subtract),
    "mul": _multiply,
    "mad": _multiply,
    "fma": _simple(3, None, floats.fma),
    "div": _simple(2, _divide, np.divide),
    "rem": _simple(2, _remainder, None),
    "neg": _simple(1, np.negative, np.negative),
    "abs": _simple(1, np.abs, np.abs),
    "min": _extremum(np.minimum, floats.minimum),
    "max": _extremum(np.maximum, floats.maximum),
    "sqrt": _simple(1, None, np.sqrt),
    "rsqrt": _simple(1, None, _wide(lambda x: 1 / np.sqrt(x))),
    "rcp": _simple(1, None, _wide(lambda x: 1 / x)),
    "ex2": _simple(1, None, _wide(np.exp2)),
    "lg2": _simple(1, None, _wide(np.log2)),
    "sin": _simple(1, None, _wide(np.sin)),
    "cos": _simple(1, None, _wide(np.cos)),
    "tanh": _simple(1, None, _wide(np.tanh)),
    "and": _simple(2, np.bitwise_and, None),
    "or": _simple(2, np.bitwise_or, None),
    "xor": _simple(2, np.bitwise_xor, None),
    "not": _simple(1, np.invert, None),
    "copysign": _copysign,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "setp": _compare,
    "selp": _select,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _logic3,
    "popc": _count_bits,
    "clz": _count_bits,
    "brev": _count_bits,
    "bfind": _find_bit,
}
