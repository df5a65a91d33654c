"""PTX types: how the bits of a register become NumPy values and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .floats import Array, bf16_bits, bf16_values

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_INT = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Type:
    """A PTX type; packed types have two lanes, the low half first, on a last axis."""

    name: str
    kind: str  # "u", "s", "b", "f" or "pred"
    nbytes: int
    lanes: int = 1

    @property
    def small(self) -> bool:
        """Whether values are float32 while the bits are a 16-bit format."""
        return self.kind == "f" and self.nbytes // self.lanes == 2

    def decode(self, bits: Array) -> Array:
        """Register bits, possibly wider than the type, to values."""
        if self.kind == "pred":
            return bits
        raw = bits.astype(UINT[self.nbytes], copy=False)
        if self.kind in "ub":
            return raw
        if self.kind == "s":
            return raw.view(_INT[self.nbytes])
        if self.lanes == 2:
            raw = np.ascontiguousarray(raw).view(UINT[self.nbytes // 2]).reshape(-1, 2)
        if not self.small:
            return raw.view(np.float64 if self.nbytes // self.lanes == 8 else np.float32)
        if self.name.startswith("bf16"):
            return bf16_values(raw)
        return raw.view(np.float16).astype(np.float32)

    def encode(self, values: Array, nbytes: int) -> Array:
        """Values to the bits of a register of `nbytes`, sign-extended where the type is signed."""
        if self.kind == "pred":
            return values
        if self.kind == "s":
            return values.astype(_INT[self.nbytes]).astype(_INT[nbytes]).view(UINT[nbytes])
        if self.kind in "ub":
            return values.astype(UINT[self.nbytes], copy=False).astype(UINT[nbytes], copy=False)
        if self.name.startswith("bf16"):
            bits = bf16_bits(values)
        elif self.small:
            bits = values.astype(np.float16).view(np.uint16)
        elif self.nbytes // self.lanes == 8:
            bits = values.astype(np.float64, copy=False).view(np.uint64)
        else:
            bits = values.astype(np.float32, copy=False).view(np.uint32)
        if self.lanes == 2:
            bits = np.ascontiguousarray(bits).view(UINT[self.nbytes]).reshape(-1)
        return bits.astype(UINT[nbytes], copy=False)

    def constant(self, number: int | float) -> Array:
        """An immediate as an array of one value."""
        if self.kind == "pred":
            return np.array([bool(number)])
        if self.kind == "f":
            if isinstance(number, int):  # bits: decimal floating-point constants have a point
                return self.decode(np.array([number % (1 << 8 * self.nbytes)], UINT[self.nbytes]))
            return np.array([number], np.float64 if self.nbytes == 8 else np.float32)
        if isinstance(number, float):  # untyped moves of a constant such as 0f3F800000
            dtype = np.float64 if self.nbytes == 8 else np.float32
            return self.decode(np.array([number], dtype).view(UINT[np.dtype(dtype).itemsize]))
        return self.decode(np.array([number % (1 << 8 * self.nbytes)], UINT[self.nbytes]))


TYPES = {
    **{
        f"{kind}{bits}": Type(f"{kind}{bits}", kind, bits // 8)
        for kind in "bus"
        for bits in (8, 16, 32, 64)
    },
    **{name: Type(name, "f", int(name[-2:]) // 8) for name in ("f16", "bf16", "f32", "f64")},
    **{name: Type(name, "f", 4, 2) for name in ("f16x2", "bf16x2")},
    "f32x2": Type("f32x2", "f", 8, 2),
    "pred": Type("pred", "pred", 0),
}
