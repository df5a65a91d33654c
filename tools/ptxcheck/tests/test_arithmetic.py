"""Arithmetic against exact integers, fractions or NumPy in float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .programs import COUNT, bfloat16, evaluate, integers, reals, towards_zero, wrap

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
        False,
        False,
        True,
        True,
    ]
    tiny = np.array([1e-40, -1e-40], np.float32)
    np.testing.assert_array_equal(evaluate("mul.ftz.f32 %o, %x, 0f7F000000;", np.float32, tiny), 0)
    assert (evaluate("mul.f32 %o, %x, 0f7F000000;", np.float32, tiny) != 0).all()
    clamped = evaluate("add.sat.f32 %o, %x, 0f00000000;", np.float32, np.float32([-1, 0.5, 3]))
    np.testing.assert_array_equal(clamped, np.float32([0, 0.5, 1]))


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
