"""Floating-point operations with the single rounding of the hardware, on NumPy arrays."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

Array = np.ndarray


def nudge(rounded: Array, error: Array, mode: str = "odd") -> Array:
    """Turn a result rounded to nearest, with the sign of what was lost, into another rounding.

    Rounding to odd keeps enough of the lost part for one further rounding to be exact.
    """
    bits: Array = rounded.view(np.int64 if rounded.dtype == np.float64 else np.int32)
    outwards = (error > 0) != np.signbit(rounded)
    lost = (error != 0) & np.isfinite(rounded) & ~np.isnan(error)
    if mode == "odd":
        move = lost & ((bits & 1) == 0)
    elif mode == "rz":
        move = lost & ~outwards
    else:
        move = lost & (error > 0 if mode == "rp" else error < 0)
    step = np.where(outwards, 1, -1).astype(bits.dtype)
    return np.where(move, bits + step, bits).view(rounded.dtype)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its exact error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def odd_sum(a: Array, b: Array) -> Array:
    """The sum rounded to odd."""
    return nudge(*two_sum(a, b))


def to_float32(x: Array, mode: str = "rn") -> Array:
    """float64 to float32 with the rounding mode rn, rz, rm, rp or odd."""
    rounded = x.astype(np.float32)
    if mode == "rn":
        return rounded
    if mode != "odd":
        # Beyond the largest float32, only directed rounding can stay finite.
        largest = np.copysign(np.float32(np.finfo(np.float32).max), rounded)
        overflow = np.isinf(rounded) & np.isfinite(x)
        rounded = np.where(overflow, largest, rounded)
    return nudge(rounded, x - rounded.astype(np.float64), mode)


def bf16_bits(x: Array) -> Array:
    """Float32 or float64 to the bits of bfloat16, rounded to nearest even once."""
    single = to_float32(x, "odd") if x.dtype == np.float64 else x
    bits = single.astype(np.float32, copy=False).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = (bits + half) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(0x7FFF), rounded).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    """Bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once: for float32 operands a float64 that rounds correctly further on."""
    if a.dtype == np.float64:
        return _fma64(*np.broadcast_arrays(a, b, c))
    wide = np.float64
    return odd_sum(*np.broadcast_arrays(a.astype(wide) * b.astype(wide), c.astype(wide)))


def _split(a: Array) -> tuple[Array, Array]:
    """Veltkamp's split of a float64 into two halves of its significand."""
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond's fused multiply-add; exponents near the limits go through fractions."""
    product = a * b
    plain = product + c
    size = np.abs(product)
    extreme = (size < 2.0**-900) & (a != 0) & (b != 0)
    extreme |= np.maximum(np.maximum(np.abs(a), np.abs(b)), np.maximum(np.abs(c), size)) > 2.0**960
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    if not error.any():
        result = plain
    else:
        high, low = two_sum(c, error)
        total, rest = two_sum(product, high)
        result = total + odd_sum(low, rest)
        result = np.where(np.isfinite(total), result, plain)
    if extreme.any():
        result = result.copy()
        for i in np.flatnonzero(extreme):
            result[i] = _fma_exact(float(a[i]), float(b[i]), float(c[i]))
    return result


def _fma_exact(a: float, b: float, c: float) -> float:
    if np.isinf(c) and np.isfinite([a, b]).all():
        return c
    if not np.isfinite([a, b, c]).all() or a == 0 or b == 0:
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def flush(x: Array) -> Array:
    """Subnormal float32 to zero of the same sign."""
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.zeros_like(x), x), x)


def minimum(a: Array, b: Array) -> Array:
    """The smaller operand; NaN loses, -0 is below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    """The larger operand; NaN loses, +0 is above -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))
