"""Conversions and comparisons of numbers of every type."""

from __future__ import annotations

import numpy as np
import pytest

from .programs import bfloat16, evaluate, integers, reals


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
