"""Each instruction against exact integers, fractions or NumPy in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx import Gpu, Kind, PtxSyntaxError, UnsupportedInstruction

WIDTHS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
COUNT = 320  # ten warps


def kernel(body: str, params: str, registers: str = "", extra: str = "") -> str:
    """A kernel `k` around a body that has `%i`, the thread number, and typed scratch registers."""
    return f"""
.version 8.0
.target sm_90
.address_size 64
{extra}
.visible .entry k({params})
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<16>;
    .reg .b64 %d<16>;
    .reg .b32 %i;
    {registers}
    mov.u32 %i, %tid.x;
    {body}
    ret;
}}
"""


def evaluate(line: str, out: type, *inputs: np.ndarray) -> np.ndarray:
    """Run one instruction per thread; its operands are %x, %y, %z and its result is %o."""
    arrays = [np.ascontiguousarray(array) for array in inputs]
    result = np.zeros(arrays[0].size, out)
    registers, body = "", ""
    for i, (name, array) in enumerate(zip("xyzo", [*arrays, result][: len(arrays)], strict=False)):
        size = array.dtype.itemsize
        registers += f".reg .{WIDTHS[size]} %{name};\n"
        body += f"ld.param.u64 %d0, [a{i}];\nmad.wide.u32 %d1, %i, {size}, %d0;\n"
        body += f"ld.global.b{8 * size} %{name}, [%d1];\n"
    size = result.dtype.itemsize
    registers += f".reg .{WIDTHS[size]} %o;\n"
    body += f"{line}\nld.param.u64 %d0, [out];\nmad.wide.u32 %d1, %i, {size}, %d0;\n"
    body += f"st.global.b{8 * size} [%d1], %o;\n"
    names = [*(f"a{i}" for i in range(len(arrays))), "out"]
    gpu = Gpu(kernel(body, ", ".join(f".param .u64 {name}" for name in names), registers))
    buffers = [gpu.buffer(array) for array in (*arrays, result)]
    gpu.launch("k", 1, result.size, buffers)
    return result


def integers(dtype: type, seed: int = 0) -> np.ndarray:
    """Random integers of all magnitudes and the edges of the type."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    bits = rng.integers(0, 1 << 62, COUNT, np.uint64) * np.uint64(4) + np.uint64(3)
    values = (bits >> rng.integers(0, 64, COUNT, np.uint64)).astype(dtype)
    edges = np.array([info.min, info.max, 0, 1, info.max - 1], dtype)
    values[:: COUNT // 5] = np.roll(edges, seed)
    return values


def reals(dtype: type, seed: int = 0, scale: float = 8.0) -> np.ndarray:
    """Random floats of many magnitudes, zeros, infinities and NaN."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(COUNT) * np.exp2(rng.uniform(-scale, scale, COUNT))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    values[:: COUNT // 5] = np.roll(special, seed)
    return values.astype(dtype)


def wrap(values: list[int], dtype: type) -> np.ndarray:
    """Exact integers to the low bits of a type."""
    bits = 8 * np.dtype(dtype).itemsize
    unsigned = np.dtype(f"u{bits // 8}")
    return np.array([value % (1 << bits) for value in values], unsigned).view(dtype)


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("name", INTEGER_OPERATIONS)
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(name: str, kind: str) -> None:
    dtype = np.dtype(("u" if kind[0] == "u" else "i") + str(int(kind[1:]) // 8)).type
    a, b = integers(dtype), integers(dtype, 1)
    exact = [INTEGER_OPERATIONS[name](int(x), int(y)) for x, y in zip(a, b, strict=True)]
    result = evaluate(f"{name}.{kind} %o, %x, %y;", dtype, a, b)
    np.testing.assert_array_equal(result, wrap(exact, dtype))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_high_wide_and_division(kind: str) -> None:
    bits = int(kind[1:])
    dtype = np.dtype(("u" if kind[0] == "u" else "i") + str(bits // 8)).type
    a, b = integers(dtype), integers(dtype, 1)
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    result = evaluate(f"mul.hi.{kind} %o, %x, %y;", dtype, a, b)
    np.testing.assert_array_equal(result, wrap([x * y >> bits for x, y in pairs], dtype))
    if bits == 32:
        result = evaluate(f"mad.wide.{kind} %o, %x, %y, %z;", np.int64, a, b, integers(np.int64))
        exact = [x * y + int(z) for (x, y), z in zip(pairs, integers(np.int64), strict=True)]
        np.testing.assert_array_equal(result, wrap(exact, np.int64))
    divisors = np.where(b == 0, dtype(3), b)
    pairs = [(int(x), int(y)) for x, y in zip(a, divisors, strict=True)]
    quotients = [towards_zero(x, y) for x, y in pairs]
    result = evaluate(f"div.{kind} %o, %x, %y;", dtype, a, divisors)
    np.testing.assert_array_equal(result, wrap(quotients, dtype))
    rests = [x - q * y for (x, y), q in zip(pairs, quotients, strict=True)]
    result = evaluate(f"rem.{kind} %o, %x, %y;", dtype, a, divisors)
    np.testing.assert_array_equal(result, wrap(rests, dtype))


def test_shifts_beyond_the_width() -> None:
    a, count = integers(np.int32), np.arange(COUNT, dtype=np.uint32) % 40
    unsigned = a.view(np.uint32)
    exact = [int(x) << int(n) for x, n in zip(a, count, strict=True)]
    result = evaluate("shl.b32 %o, %x, %y;", np.int32, a, count)
    np.testing.assert_array_equal(result, wrap(exact, np.int32))
    exact = [int(x) >> int(n) for x, n in zip(a, count, strict=True)]
    result = evaluate("shr.s32 %o, %x, %y;", np.int32, a, count)
    np.testing.assert_array_equal(result, wrap(exact, np.int32))
    exact = [int(x) >> int(n) for x, n in zip(unsigned, count, strict=True)]
    result = evaluate("shr.u32 %o, %x, %y;", np.uint32, unsigned, count)
    np.testing.assert_array_equal(result, wrap(exact, np.uint32))


def test_bit_fields() -> None:
    a, b = integers(np.uint32), integers(np.uint32, 1)
    start, length = 5, 9
    field = [int(x) >> start & (1 << length) - 1 for x in a]
    result = evaluate(f"bfe.u32 %o, %x, {start}, {length};", np.uint32, a)
    np.testing.assert_array_equal(result, field)
    signed = [x - (1 << length) if x >> (length - 1) else x for x in field]
    result = evaluate(f"bfe.s32 %o, %x, {start}, {length};", np.int32, a)
    np.testing.assert_array_equal(result, signed)
    mask = ((1 << length) - 1) << start
    exact = [int(y) & ~mask | int(x) << start & mask for x, y in zip(a, b, strict=True)]
    result = evaluate(f"bfi.b32 %o, %x, %y, {start}, {length};", np.uint32, a, b)
    np.testing.assert_array_equal(result, exact)
    np.testing.assert_array_equal(
        evaluate("popc.b32 %o, %x;", np.uint32, a), [int(x).bit_count() for x in a]
    )
    np.testing.assert_array_equal(
        evaluate("clz.b32 %o, %x;", np.uint32, a), [32 - int(x).bit_length() for x in a]
    )
    for shift, exact in (
        ("", [int(x).bit_length() - 1 for x in a]),
        (".shiftamt", [32 - int(x).bit_length() if x else -1 for x in a]),
    ):
        result = evaluate(f"bfind{shift}.u32 %o, %x;", np.uint32, a)
        np.testing.assert_array_equal(result, wrap(exact, np.uint32))
    reversed_bits = [int(f"{int(x):032b}"[::-1], 2) for x in a]
    np.testing.assert_array_equal(evaluate("brev.b32 %o, %x;", np.uint32, a), reversed_bits)


def test_permute_funnel_and_logic() -> None:
    a, b, c = (integers(np.uint32, seed) for seed in range(3))
    rows = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
    both = [(y << 32 | x).to_bytes(8, "little") for x, y, _ in rows]
    exact = [int.from_bytes(bytes([w[6], w[1], w[4], w[3]]), "little") for w in both]
    np.testing.assert_array_equal(evaluate("prmt.b32 %o, %x, %y, 0x3416;", np.uint32, a, b), exact)
    signs = [0xFF if w[2] & 0x80 else 0 for w in both]
    result = evaluate("prmt.b32 %o, %x, %y, 0xAAAA;", np.uint32, a, b)
    np.testing.assert_array_equal(result, [sign * 0x01010101 for sign in signs])
    result = evaluate("shf.l.wrap.b32 %o, %x, %y, %z;", np.uint32, a, b, c)
    exact = [((y << 32 | x) << (z & 31)) >> 32 & 0xFFFFFFFF for x, y, z in rows]
    np.testing.assert_array_equal(result, exact)
    result = evaluate("shf.r.clamp.b32 %o, %x, %y, %z;", np.uint32, a, b, c % np.uint32(50))
    exact = [(y << 32 | x) >> min(z % 50, 32) & 0xFFFFFFFF for x, y, z in rows]
    np.testing.assert_array_equal(result, exact)
    result = evaluate("lop3.b32 %o, %x, %y, %z, 0xE8;", np.uint32, a, b, c)  # majority
    np.testing.assert_array_equal(result, a & b | a & c | b & c)


def fused(a: float, b: float, c: float, dtype: type) -> float:
    """a * b + c rounded once; finite operands."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if dtype is np.float64:
        return float(exact)
    # The nearest of the neighbouring values of the narrow type, ties to even.
    with np.errstate(over="ignore"):
        near = dtype(float(exact))
    below, above = np.nextafter(near, dtype(-np.inf)), np.nextafter(near, dtype(np.inf))
    choices = [v for v in (near, below, above) if np.isfinite(v)]
    bits = f"u{np.dtype(dtype).itemsize}"
    return min(choices, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(bits)) & 1))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("f64", np.float64), ("f32", np.float32), ("f16", np.float16)]
)
def test_fused_multiply_add_rounds_once(kind: str, dtype: type) -> None:
    rng = np.random.default_rng(7)
    digits = np.finfo(dtype).nmant
    a = (1 + rng.integers(0, 8, COUNT) * 2.0**-digits).astype(dtype)
    b = (1 + rng.integers(0, 8, COUNT) * 2.0**-digits).astype(dtype)
    c = (-1.0 + rng.integers(0, 3, COUNT) * 2.0**-digits).astype(dtype)
    c[::2] = (2.0 ** rng.integers(-2 * digits, digits, COUNT)).astype(dtype)[::2]  # near halves
    c[::4] = -c[::4]
    result = evaluate(f"fma.rn.{kind} %o, %x, %y, %z;", dtype, a, b, c)
    exact = [fused(x, y, z, dtype) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(result, np.array(exact, dtype))


def test_fused_multiply_add_at_the_limits() -> None:
    a = np.array([1e308, 1e308, 1e-308, np.inf, np.nan, 0.0, 3e-200, 1e200])
    b = np.array([10.0, 1.5, 1e-10, 0.0, 1.0, 5.0, 3e-200, 1e200])
    c = np.array([-np.inf, -1e308, 1e-320, 1.0, 1.0, -0.0, 1e-300, -1e308])
    result = evaluate("fma.rn.f64 %o, %x, %y, %z;", np.float64, a, b, c)
    large = fused(1e308, 1.5, -1e308, np.float64)
    small = fused(1e-308, 1e-10, 1e-320, np.float64)
    expected = [-np.inf, large, small, np.nan, np.nan, 0.0, 1e-300, np.inf]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("kind", "dtype"), [("f64", np.float64), ("f32", np.float32)])
def test_real_arithmetic(kind: str, dtype: type) -> None:
    a, b = reals(dtype), reals(dtype, 1)
    with np.errstate(all="ignore"):
        for line, expected in {
            f"add.{kind} %o, %x, %y;": a + b,
            f"sub.rn.{kind} %o, %x, %y;": a - b,
            f"mul.{kind} %o, %x, %y;": a * b,
            f"div.rn.{kind} %o, %x, %y;": a / b,
            f"min.{kind} %o, %x, %y;": np.fmin(a, b),
            f"max.{kind} %o, %x, %y;": np.fmax(a, b),
            f"sqrt.rn.{kind} %o, %x;": np.sqrt(a),
            f"rcp.rn.{kind} %o, %x;": (1 / a).astype(dtype),
            f"neg.{kind} %o, %x;": -a,
            f"abs.{kind} %o, %x;": np.abs(a),
        }.items():
            inputs = (a, b) if "%y" in line else (a,)
            np.testing.assert_array_equal(evaluate(line, dtype, *inputs), expected, line)


def test_approximate_functions() -> None:
    x = np.abs(reals(np.float32, scale=3))
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        for line, expected in {
            "rsqrt.approx.f32 %o, %x;": 1 / np.sqrt(wide),
            "rcp.approx.ftz.f32 %o, %x;": 1 / wide,
            "ex2.approx.f32 %o, %x;": np.exp2(wide),
            "lg2.approx.f32 %o, %x;": np.log2(wide),
            "div.full.f32 %o, 0f3F800000, %x;": 1 / wide,
        }.items():
            result = evaluate(line, np.float32, x)
            np.testing.assert_allclose(result, expected.astype(np.float32), rtol=2e-7, err_msg=line)


def test_signed_zeros_nan_and_subnormals() -> None:
    a = np.array([0.0, -0.0, np.nan, 1.0], np.float32)
    b = np.array([-0.0, 0.0, 2.0, np.nan], np.float32)
    low = evaluate("min.f32 %o, %x, %y;", np.float32, a, b)
    high = evaluate("max.f32 %o, %x, %y;", np.float32, a, b)
    assert np.signbit(low).tolist() == [True, True, False, False]
    assert np.signbit(high).tolist() == [False] * 4
    assert np.isnan(evaluate("max.NaN.f32 %o, %x, %y;", np.float32, a, b)).tolist() == [
        False, False, True, True,
    ]  # fmt: skip
    tiny = np.array([1e-40, -1e-40], np.float32)
    np.testing.assert_array_equal(evaluate("mul.ftz.f32 %o, %x, 0f7F000000;", np.float32, tiny), 0)
    assert (evaluate("mul.f32 %o, %x, 0f7F000000;", np.float32, tiny) != 0).all()
    clamped = evaluate("add.sat.f32 %o, %x, 0f00000000;", np.float32, np.float32([-1, 0.5, 3]))
    np.testing.assert_array_equal(clamped, np.float32([0, 0.5, 1]))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, one value at a time."""
    out = []
    for value in values.astype(np.float64):
        if math.isnan(value):
            out.append(0x7FFF)
            continue
        with np.errstate(over="ignore"):
            down = int(np.float32(abs(value)).view(np.uint32)) >> 16
        down -= down > 0  # the conversion to float32 may have rounded up
        neighbours = range(down, min(down + 3, 0x7F80) + 1)
        exact = [float(np.array(n << 16, np.uint32).view(np.float32)) for n in neighbours]
        exact = [2.0**128 if math.isinf(v) and not math.isinf(value) else v for v in exact]
        errors = [abs(v - abs(value)) if v != abs(value) else 0.0 for v in exact]
        best = min(zip(errors, (n & 1 for n in neighbours), neighbours, strict=True))[2]
        out.append(best | (0x8000 if math.copysign(1, value) < 0 else 0))
    return np.array(out, np.uint16)


@pytest.mark.parametrize("source", ["f32", "f64"])
def test_conversion_to_bfloat16(source: str) -> None:
    dtype = np.float32 if source == "f32" else np.float64
    x = reals(dtype, scale=100 if source == "f32" else 30)
    x[1:60:2] = 1 + np.arange(30) * 2.0**-8  # ties
    if source == "f64":
        x[2:60:2] = 1 + 2.0**-8 + np.array([1, -1, 0] * 10)[: x[2:60:2].size] * 2.0**-50
    result = evaluate(f"cvt.rn.bf16.{source} %o, %x;", np.uint16, x)
    np.testing.assert_array_equal(result, bfloat16(x))


def test_conversions_from_and_to_halves() -> None:
    half = reals(np.float16)
    np.testing.assert_array_equal(
        evaluate("cvt.f64.f16 %o, %x;", np.float64, half), half.astype(np.float64)
    )
    bits = bfloat16(reals(np.float32))
    wide = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    for kind, dtype in (("f32", np.float32), ("f64", np.float64)):
        result = evaluate(f"cvt.{kind}.bf16 %o, %x;", dtype, bits)
        np.testing.assert_array_equal(result, wide.astype(dtype))
    x, y = reals(np.float32), reals(np.float32, 1)
    with np.errstate(over="ignore"):
        result = evaluate("cvt.rn.f16x2.f32 %o, %x, %y;", np.uint32, x, y).view(np.float16)
        np.testing.assert_array_equal(result[1::2], x.astype(np.float16))
        np.testing.assert_array_equal(result[0::2], y.astype(np.float16))
    result = evaluate("cvt.rn.bf16x2.f32 %o, %x, %y;", np.uint32, x, y).view(np.uint16)
    np.testing.assert_array_equal(result[1::2], bfloat16(x))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_directed_rounding_of_float64(mode: str) -> None:
    x = reals(np.float64)
    result = evaluate(f"cvt.{mode}.f32.f64 %o, %x;", np.float32, x).astype(np.float64)
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
    below = np.where(near > x, np.nextafter(near, np.float32(-np.inf)), near)
    above = np.where(near < x, np.nextafter(near, np.float32(np.inf)), near)
    zero = np.where(x < 0, above, below)
    expected = {"rn": near, "rz": zero, "rm": below, "rp": above}[mode]
    np.testing.assert_array_equal(result, expected.astype(np.float64))


def test_float_to_integer_saturates() -> None:
    x = np.array([2.5, -2.5, 3.5, 1e20, -1e20, np.nan, np.inf, -0.7])
    for mode, whole in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        result = evaluate(f"cvt.{mode}.s32.f64 %o, %x;", np.int32, x)
        clipped = np.clip(whole(np.nan_to_num(x, nan=0.0)), -(2**31), 2**31 - 1)
        np.testing.assert_array_equal(result, clipped.astype(np.int32))
    unsigned = evaluate("cvt.rzi.u64.f64 %o, %x;", np.uint64, x)
    assert unsigned.tolist() == [2, 0, 3, 2**64 - 1, 0, 0, 2**64 - 1, 0]


def test_integer_conversions() -> None:
    x = integers(np.int64)
    np.testing.assert_array_equal(
        evaluate("cvt.rn.f32.s64 %o, %x;", np.float32, x), x.astype(np.float32)
    )
    np.testing.assert_array_equal(
        evaluate("cvt.rn.f64.u64 %o, %x;", np.float64, x.view(np.uint64)), x.view(np.uint64) * 1.0
    )
    np.testing.assert_array_equal(evaluate("cvt.s64.s8 %o, %x;", np.int64, x), x.astype(np.int8))
    np.testing.assert_array_equal(evaluate("cvt.u32.u8 %o, %x;", np.uint32, x), x.astype(np.uint8))
    np.testing.assert_array_equal(
        evaluate("cvt.u64.s32 %o, %x;", np.int64, x.astype(np.int32)), x.astype(np.int32)
    )
    np.testing.assert_array_equal(
        evaluate("cvt.sat.s8.s64 %o, %x;", np.int16, x), np.clip(x, -128, 127)
    )


def test_packed_halves() -> None:
    a, b, c = (reals(np.float16, seed, 3).repeat(2)[: 2 * COUNT] for seed in range(3))
    words = [array.view(np.uint32) for array in (a, b, c)]
    with np.errstate(all="ignore"):
        result = evaluate("fma.rn.f16x2 %o, %x, %y, %z;", np.uint32, *words).view(np.float16)
        finite = np.isfinite(result) & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        rows = zip(a[finite], b[finite], c[finite], strict=True)
        np.testing.assert_array_equal(result[finite], [fused(*row, np.float16) for row in rows])
        product = evaluate("mul.bf16x2 %o, %x, %y;", np.uint32, *words[:2]).view(np.uint16)
    wide = [(w.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32) for w in words]
    with np.errstate(all="ignore"):
        expected = wide[0].astype(np.float64) * wide[1]
    normal = np.abs(expected) > 1e-30  # products of subnormals are tested nowhere
    np.testing.assert_array_equal(product[normal], bfloat16(expected[normal]))


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"]
)
def test_comparisons(name: str) -> None:
    x, y = reals(np.float32), reals(np.float32, 1)
    y[::3] = x[::3]
    unordered = np.isnan(x) | np.isnan(y)
    plain = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    if name in plain:
        truth = plain[name] & ~unordered
    else:
        truth = {"num": ~unordered, "nan": unordered}.get(name)
        if truth is None:
            truth = plain[name[:-1]] | unordered
    line = f"setp.{name}.f32 %p1|%p2, %x, %y;\nselp.b32 %o, 1, 2, %p1;\n@%p2 add.u32 %o, %o, 4;"
    np.testing.assert_array_equal(evaluate(line, np.uint32, x, y), np.where(truth, 1, 6))


def test_predicates_and_guards() -> None:
    a, b = integers(np.int32), integers(np.int32, 1)
    line = """
    setp.gt.s32 %p1, %x, 5;
    setp.lo.and.u32 %p2, %x, %y, !%p1;
    xor.pred %p3, %p1, %p2;
    not.pred %p4, %p3;
    mov.b32 %o, 0;
    @%p2 mov.b32 %o, 1;
    @!%p3 or.b32 %o, %o, 2;
    @%p4 or.b32 %o, %o, 4;
    """
    first = a > 5
    second = (a.view(np.uint32) < b.view(np.uint32)) & ~first
    third = first ^ second
    expected = second * 1 | ~third * 6
    np.testing.assert_array_equal(evaluate(line, np.int32, a, b), expected)


def test_packing_scopes_and_constants() -> None:
    x = integers(np.uint64)
    line = """
    mov.b64 {%r1, %r2}, %x;
    mov.b64 {_, %r3}, %x;
    { .reg .b16 low, high; mov.b32 {low, high}, %r1; mov.b32 %r4, {high, low}; }
    { .reg .b32 low; add.u32 low, %r2, 0xFFFFFFFF; sub.u32 %r5, low, %r3; }
    add.u32 %r4, %r4, %r5;
    mov.b64 %o, {%r4, %r2};
    """
    words = x.view(np.uint32).reshape(-1, 2)
    low = (words[:, 0] >> np.uint32(16) | words[:, 0] << np.uint32(16)) - np.uint32(1)
    expected = words[:, 1].astype(np.uint64) << np.uint64(32) | low
    np.testing.assert_array_equal(evaluate(line, np.uint64, x), expected)
    constant = "mov.f64 %o, 0d3FF8000000000000;"
    np.testing.assert_array_equal(evaluate(constant, np.float64, x), 1.5)
    np.testing.assert_array_equal(evaluate("mov.f32 %o, 0fBF800000;", np.float32, x), -1.0)


@pytest.mark.parametrize(
    ("mode", "operand", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 7, 31, lambda lane: np.where(lane + 7 < 32, lane + 7, lane)),
        ("up", 3, 0, lambda lane: np.where(lane >= 3, lane - 3, lane)),
        ("idx", 9, 31, lambda lane: 0 * lane + 9),
        ("bfly", 4, 0x181F, lambda lane: lane ^ 4),
        ("down", 2, 0x181F, lambda lane: np.where(lane % 8 < 6, lane + 2, lane)),
    ],
)
def test_shuffles(mode: str, operand: int, clamp: int, source) -> None:
    x = integers(np.uint32)
    lane = np.arange(COUNT) % 32
    chosen = x[np.arange(COUNT) - lane + source(lane)]
    result = evaluate(f"shfl.sync.{mode}.b32 %o, %x, {operand}, {clamp}, -1;", np.uint32, x)
    np.testing.assert_array_equal(result, chosen)


def test_votes_and_warp_reductions() -> None:
    x = integers(np.uint32)
    warps = x.reshape(-1, 32)
    big = warps > 1000
    ballot = (big.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).repeat(32)
    line = "setp.gt.u32 %p1, %x, 1000;\nvote.sync.ballot.b32 %o, %p1, -1;"
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), ballot)
    line = "setp.gt.u32 %p1, %x, 1000;\nvote.sync.any.pred %p2, %p1, -1;\nselp.b32 %o, 1, 0, %p2;"
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), big.any(1).repeat(32))
    reduced = np.add.reduce(warps, axis=1, dtype=np.uint32).repeat(32)
    np.testing.assert_array_equal(evaluate("redux.sync.add.u32 %o, %x, -1;", np.uint32, x), reduced)
    signed = warps.view(np.int32).min(1).repeat(32)
    np.testing.assert_array_equal(evaluate("redux.sync.min.s32 %o, %x, -1;", np.int32, x), signed)


def test_matrices_from_shared_memory() -> None:
    """Rows of four matrices in the reverse order: the address of each comes from a lane of its own.

    Thread 4 * r + c of a warp receives entries 2 * c and 2 * c + 1 of row r.
    """
    x = integers(np.uint32)[:32]
    shared = ".shared .align 16 .b8 rows[1024];"
    line = f"""
    {{ {shared}
    mov.u32 %r0, rows;
    mad.lo.u32 %r1, %i, 16, %r0;
    st.shared.v4.b32 [%r1], {{%x, %i, %x, %i}};
    bar.warp.sync -1;
    sub.u32 %r2, 31, %i;
    mad.lo.u32 %r2, %r2, 16, %r0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2];
    mad.lo.u32 %r3, %r4, 3, %r3;
    mad.lo.u32 %r3, %r5, 5, %r3;
    mad.lo.u32 %o, %r6, 7, %r3; }}
    """
    lane = np.arange(32)
    total = np.zeros(32, np.uint32)
    for matrix, factor in enumerate((1, 3, 5, 7)):
        row = 31 - (8 * matrix + lane // 4)
        entries = np.where(lane % 2 == 0, x[row], row.astype(np.uint32))
        total += np.uint32(factor) * entries
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), total)


def test_shuffle_among_a_part_of_the_warp_and_divergent_loops() -> None:
    line = """
    and.b32 %r1, %i, 31;
    mov.b32 %o, 0;
    setp.ge.u32 %p1, %r1, 16;
    @%p1 bra HIGH;
    shfl.sync.bfly.b32 %o, %x, 1, 31, 0xFFFF;
    bra.uni JOIN;
HIGH:
    add.u32 %o, %o, %x;
    add.u32 %r1, %r1, -1;
    setp.ge.u32 %p2, %r1, 16;
    @%p2 bra HIGH;
JOIN:
    activemask.b32 %r2;
    add.u32 %o, %o, %r2;
    """
    x = integers(np.uint32)
    thread = np.arange(COUNT)
    lane = thread % 32
    looped = x * (lane - 15).astype(np.uint32)
    expected = np.where(lane < 16, x[thread ^ 1], looped) - np.uint32(1)
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), expected)


def test_atomics_and_constant_tables() -> None:
    body = """
    ld.param.u64 %d0, [out];
    mov.u64 %d1, table;
    and.b32 %r1, %i, 3;
    mad.wide.u32 %d2, %r1, 4, %d1;
    ld.const.f32 %r2, [%d2];
    red.global.add.f32 [%d0], %r2;
    atom.global.add.u32 %r3, [%d0+4], 1;
    atom.global.max.s32 %r4, [%d0+8], %i;
    atom.global.cas.b32 %r5, [%d0+12], 0, %i;
    atom.global.inc.u32 %r6, [%d0+16], 9;
    mad.wide.u32 %d3, %i, 4, %d0;
    st.global.u32 [%d3+32], %r3;
    """
    extra = ".const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};"
    gpu = Gpu(kernel(body, ".param .u64 out", extra=extra))
    out = np.zeros(8 + 64, np.uint32)
    gpu.launch("k", 1, 64, [gpu.buffer(out)])
    assert out[:1].view(np.float32)[0] == 160
    assert out[1:5].tolist() == [64, 63, 1, 64 % 10]
    assert sorted(out[8:].tolist()) == list(range(64))


@pytest.mark.parametrize(
    ("kind", "count"), [("u8", 2), ("b16", 4), ("f32", 2), ("b32", 8), ("u64", 2), ("b64", 4)]
)
def test_vectors_in_memory(kind: str, count: int) -> None:
    nbytes = int(kind[1:]) // 8
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[nbytes]
    names = ", ".join(f"%{letter}{i + 4}" for i in range(count))
    body = f"""
    ld.param.u64 %d0, [x];
    ld.param.u64 %d1, [out];
    mul.wide.u32 %d2, %i, {nbytes * count};
    add.s64 %d0, %d0, %d2;
    add.s64 %d1, %d1, %d2;
    ld.global.nc.L1::no_allocate.L2::128B.v{count}.{kind} {{{names}}}, [%d0];
    st.global.cs.v{count}.{kind} [%d1], {{{names}}};
    """
    x = np.random.default_rng(0).integers(0, 256, 96 * nbytes * count).astype(np.uint8)
    out = np.zeros_like(x)
    gpu = Gpu(kernel(body, ".param .u64 x, .param .u64 out"))
    source, target = gpu.buffer(x), gpu.buffer(out, initialised=False)
    report = gpu.launch("k", 1, 96, [source, target])
    np.testing.assert_array_equal(out, x)
    assert report.load_widths(source) == report.store_widths(target) == {8 * nbytes * count}


def test_special_registers_of_three_dimensions() -> None:
    body = """
    ld.param.u64 %d0, [out];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x;
    mad.lo.s32 %r8, %r6, %r7, %r5;
    mad.lo.s32 %r9, %r8, 32, %r4;
    mad.wide.u32 %d1, %r9, 4, %d0;
    mov.u32 %r10, %laneid; mov.u32 %r11, %lanemask_lt;
    popc.b32 %r12, %r11;
    setp.ne.u32 %p1, %r10, %r12;
    @%p1 trap;
    st.global.u32 [%d1], %r9;
    """
    gpu = Gpu(kernel(body, ".param .u64 out"), max_threads=64)
    out = np.zeros(6 * 32, np.uint32)
    report = gpu.launch("k", (3, 2), (8, 4), [gpu.buffer(out, initialised=False)])
    np.testing.assert_array_equal(out, np.arange(192))
    assert report.faults == []


def test_block_wide_reductions_at_a_barrier() -> None:
    body = """
    ld.param.u64 %d0, [out];
    setp.lt.u32 %p1, %i, 70;
    bar.red.popc.u32 %r1, 0, %p1;
    barrier.cta.red.or.aligned.pred %p2, 0, !%p1;
    selp.b32 %r2, 1000, 0, %p2;
    add.u32 %r1, %r1, %r2;
    mad.wide.u32 %d1, %i, 4, %d0;
    st.global.u32 [%d1], %r1;
    """
    gpu = Gpu(kernel(body, ".param .u64 out"))
    out = np.zeros(128, np.uint32)
    gpu.launch("k", 1, 128, [gpu.buffer(out)])
    np.testing.assert_array_equal(out, 1070)


@pytest.mark.parametrize(
    "line",
    [
        "tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [x, {%r5, %r6}];",
        "add.rz.f32 %r1, %r2, %r3;",
        "frobnicate.b32 %r1, %r2;",
        "mov.u32 %r1, %smid;",
        "ld.global.v2.f32 %r1, [%d1];",
        "add.u64 %r1, %d1, %d2;",
        "call.uni helper;",
    ],
)
def test_unknown_instructions_fail_by_name(line: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=line.split(" ")[0].replace(".", r"\.")):
        Gpu(kernel(line, ".param .u64 out"))


def test_endless_loops_and_wrong_arguments() -> None:
    gpu = Gpu(kernel("AGAIN: bra AGAIN;", ".param .u32 n"), max_steps=100)
    assert gpu.launch("k", 1, 32, [1], check=False).kinds() == {Kind.HANG}
    with pytest.raises(ValueError, match="takes 1 arguments"):
        gpu.launch("k", 1, 32, [1, 2])
    with pytest.raises(ValueError, match="does not fit"):
        gpu.launch("k", 1, 32, [1 << 32])
    with pytest.raises(PtxSyntaxError):
        Gpu(".visible .entry k() { ret }")
