"""Functions that read and write the operands of an instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import Array
from .machine import Machine, Threads
from .parser import Address, Imm, Instruction, Reg, Special, Symbol
from .values import TYPES, UINT, Type

Reader = Callable[[Machine, Threads], Array]
Writer = Callable[[Machine, Threads, Array], None]


def reader(operand: Any, kind: Type, instruction: Instruction) -> Reader:
    """Values of a type, one for each thread or a single one for all."""
    if isinstance(operand, Imm):
        constant = kind.constant(operand.value)
        if kind.lanes == 2 and constant.ndim == 1:
            raise instruction.unsupported("packed constant")
        return lambda m, threads: constant
    if isinstance(operand, Symbol):
        return lambda m, threads: kind.constant(m.address(operand, instruction))
    if isinstance(operand, Special):
        return _special(operand, kind, instruction)
    if not isinstance(operand, Reg) or (operand.nbytes == 0) != (kind.kind == "pred"):
        raise instruction.unsupported("operand")
    if operand.nbytes < kind.nbytes:
        raise instruction.unsupported(f"{operand.name} is narrower than {kind.name}")
    name, nbytes = operand.name, operand.nbytes
    if operand.negated:
        return lambda m, threads: ~m.read(name, 0, threads)
    return lambda m, threads: kind.decode(m.read(name, nbytes, threads))


def _special(operand: Special, kind: Type, instruction: Instruction) -> Reader:
    stem = operand.name.split(".")[0]
    known = {
        "%tid",
        "%ntid",
        "%ctaid",
        "%nctaid",
        "%laneid",
        "%warpid",
        "%nwarpid",
        "%clock",
        "%clock64",
        "%clock_hi",
    }
    if stem not in known and not stem.startswith("%lanemask_"):
        raise instruction.unsupported(f"special register {operand.name}")

    def read(m: Machine, threads: Threads) -> Array:
        values = m.special(operand.name)
        if values is None:
            raise instruction.unsupported(f"special register {operand.name}")
        return kind.decode(
            (values if threads is None else values[threads]).astype(UINT[kind.nbytes])
        )

    return read


def writer(operand: Any, instruction: Instruction, kind: Type | None = None) -> Writer:
    """Write values of a type, or bits where no type is given; None is the sink `_`."""
    if operand is None:
        return lambda m, threads, values: None
    if not isinstance(operand, Reg) or (kind and operand.nbytes < kind.nbytes):
        raise instruction.unsupported("destination")
    name, nbytes = operand.name, operand.nbytes
    if kind is None:
        return lambda m, threads, bits: m.write(name, nbytes, threads, bits)
    if (nbytes == 0) != (kind.kind == "pred"):
        raise instruction.unsupported("destination")
    return lambda m, threads, values: m.write(name, nbytes, threads, kind.encode(values, nbytes))


def address_reader(operand: Any, instruction: Instruction) -> Reader:
    """64-bit addresses; 32-bit registers are zero-extended, as shared addresses are."""
    if not isinstance(operand, Address):
        raise instruction.unsupported("address")
    base, offset = operand.base, np.uint64(operand.offset % (1 << 64))
    kind = TYPES["u64"]
    if isinstance(base, Reg) and base.nbytes == 4:
        kind = TYPES["u32"]
    read = reader(base, kind, instruction)
    return lambda m, threads: read(m, threads).astype(np.uint64) + offset
