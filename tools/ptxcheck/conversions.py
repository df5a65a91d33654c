"""`cvt` between all integer and floating-point types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats
from .arithmetic import Signature
from .floats import Array
from .parser import Instruction
from .values import TYPES, UINT, Type

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TO_FLOAT = {"rn", "rz", "rm", "rp"}


def signature(instruction: Instruction) -> Signature:
    """How to compute a `cvt`."""
    to, source = (TYPES.get(name) for name in instruction.mods[-2:])
    mods = set(instruction.mods[:-2])
    if to is None or source is None or mods - {*_TO_INTEGER, *_TO_FLOAT, "ftz", "sat"}:
        raise instruction.unsupported()
    if to.lanes == 2 or len(instruction.operands) == 3:
        return _pack(instruction, to, source, mods)
    if source.kind == "f" and to.kind == "f":
        return Signature((to,), (source,), _float_to_float(instruction, to, source, mods))
    if source.kind == "f":
        return Signature((to,), (source,), _float_to_integer(instruction, to, source, mods))
    if to.kind == "f":
        return Signature((to,), (source,), _integer_to_float(instruction, to, source, mods))
    if mods - {"sat"}:
        raise instruction.unsupported()
    return Signature((to,), (source,), _integer_to_integer(to, saturate="sat" in mods))


def _limits(kind: Type) -> tuple[int, int]:
    info = np.iinfo(kind.decode(np.zeros(1, UINT[kind.nbytes])).dtype)
    return int(info.min), int(info.max)


def _integer_to_integer(to: Type, saturate: bool) -> Callable[[Array], Array]:
    if not saturate:
        # A signed source is extended by its own sign, whatever the signedness of the result.
        return lambda a: a.astype(np.int64).view(np.uint64) if a.dtype.kind == "i" else a
    low, high = _limits(to)

    def clamp(a: Array) -> Array:
        info = np.iinfo(a.dtype)
        return np.clip(a, max(low, int(info.min)), min(high, int(info.max)))

    return clamp


def _pack(instruction: Instruction, to: Type, source: Type, mods: set[str]) -> Signature:
    """Two float32 into one packed register: the first operand goes to the upper half."""
    if source.name != "f32" or to.lanes != 2 or not to.small or mods != {"rn"}:
        raise instruction.unsupported("packed conversion")
    return Signature((to,), (source, source), lambda a, b: np.stack(np.broadcast_arrays(b, a), 1))


def _float_to_float(
    instruction: Instruction, to: Type, source: Type, mods: set[str]
) -> Callable[[Array], Array]:
    integral = [_TO_INTEGER[mod] for mod in mods if mod in _TO_INTEGER]
    directed = mods & {"rz", "rm", "rp"}
    if directed and (to.name, source.name) != ("f32", "f64"):
        raise instruction.unsupported("rounding mode")

    def convert(a: Array) -> Array:
        if "ftz" in mods and source.name == "f32":
            a = floats.flush(a)
        for function in integral:
            a = function(a)
        if directed:
            a = floats.to_float32(a, next(iter(directed)))
        if "ftz" in mods and to.name == "f32":
            a = floats.flush(a.astype(np.float32))
        if "sat" in mods:
            a = np.where(np.isnan(a), 0, np.clip(a, 0, 1)).astype(a.dtype)
        return a

    return convert


def _float_to_integer(
    instruction: Instruction, to: Type, source: Type, mods: set[str]
) -> Callable[[Array], Array]:
    integral = [_TO_INTEGER[mod] for mod in mods if mod in _TO_INTEGER]
    if len(integral) != 1:
        raise instruction.unsupported("rounding mode")
    low, high = _limits(to)
    dtype = to.decode(np.zeros(1, UINT[to.nbytes])).dtype

    def convert(a: Array) -> Array:
        whole = integral[0](a.astype(np.float64))
        inside = (whole > low) & (whole < high)
        result = np.where(inside, whole, 0).astype(dtype)
        result = np.where(whole >= high, dtype.type(high), result)
        return np.where(whole <= low, dtype.type(low), result)  # NaN gives 0

    return convert


def _integer_to_float(
    instruction: Instruction, to: Type, source: Type, mods: set[str]
) -> Callable[[Array], Array]:
    directed = mods & {"rz", "rm", "rp"}
    exact = source.nbytes < 8  # in float64
    if mods & set(_TO_INTEGER) or ((directed or to.small) and not exact):
        raise instruction.unsupported()
    if directed and to.name == "f32":
        return lambda a: floats.to_float32(a.astype(np.float64), next(iter(directed)))
    if directed and to.nbytes < 8:
        raise instruction.unsupported("rounding mode")
    return lambda a: a.astype(np.float32 if to.name == "f32" else np.float64)
