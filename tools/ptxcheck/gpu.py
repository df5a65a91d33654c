"""The device a test sees: buffers, launches and their reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .bind import bind
from .conflicts import Conflict, count_loads, find_conflicts
from .faults import Fault, FaultError, FaultLog, Kind
from .floats import Array
from .machine import Launch, Machine, Program, StoppedError, make_fault
from .memory import Access, Buffer, GlobalMemory, Region
from .parser import Module, Variable, parse


@dataclass
class Report:
    """The faults of a launch and the traffic of each buffer."""

    faults: list[Fault]
    steps: int  # instructions issued, each for all threads of a chunk of CTAs at once
    logs: dict[Region, list[Access]]

    def kinds(self) -> set[Kind]:
        """The kinds of faults found."""
        return {fault.kind for fault in self.faults}

    def _accesses(self, buffer: Buffer, write: bool) -> list[Access]:
        logs = (self.logs.get(piece, []) for piece in buffer.pieces)
        return [access for log in logs for access in log if access.write == write]

    def load_counts(self, buffer: Buffer, piece: int = 0) -> Array:
        """How many times each byte of the buffer (or of one of its pieces) was loaded."""
        region = buffer.pieces[piece]
        return count_loads(self.logs.get(region, []), region.data.size)

    def loaded_bytes(self, buffer: Buffer) -> int:
        """Bytes loaded by all threads together."""
        return sum(access.offsets.size * access.nbytes for access in self._accesses(buffer, False))

    def stored_bytes(self, buffer: Buffer) -> int:
        """Bytes stored by all threads together."""
        return sum(access.offsets.size * access.nbytes for access in self._accesses(buffer, True))

    def load_widths(self, buffer: Buffer) -> set[int]:
        """Bits per thread of the loads that touched the buffer."""
        return {8 * access.nbytes for access in self._accesses(buffer, False)}

    def store_widths(self, buffer: Buffer) -> set[int]:
        """Bits per thread of the stores that touched the buffer."""
        return {8 * access.nbytes for access in self._accesses(buffer, True)}


class Gpu:
    """Executes the kernels of one PTX text."""

    def __init__(
        self,
        ptx: str,
        *,
        kernels: Sequence[str] | None = None,
        max_threads: int = 1 << 14,
        max_steps: int = 1_000_000,
    ) -> None:
        """Bind all kernels, or those named; `max_threads` run at once, at least one CTA."""
        module, self.programs = _bind(ptx, None if kernels is None else tuple(kernels))
        self.max_threads, self.max_steps = max_threads, max_steps
        self.memory = GlobalMemory()
        self.symbols: dict[str, int] = {}
        for variable in module.variables:
            self._add_variable(variable)

    def _add_variable(self, variable: Variable) -> None:
        if variable.space in ("global", "const"):
            data = np.zeros(variable.nbytes, np.uint8)
            if variable.data is not None:
                data[:] = np.frombuffer(variable.data, np.uint8)
            constant = variable.space == "const"
            buffer = self.memory.add({0: data}, data.size, variable.name, read_only=constant)
            self.symbols[variable.name] = buffer.address

    def buffer(self, array: Array, name: str | None = None, **options: Any) -> Buffer:
        """Register an array, in place; the gaps of a strided one are out of bounds.

        Options: `align` (the base is a multiple of it and of no larger power of two; default
        256), `initialised` (False: reads before a write are faults), `read_only` (writes are
        faults) and `conflicts` (False: accesses by different threads are not compared).
        """
        steps = zip(array.shape, array.strides, strict=True)
        span = sum((n - 1) * stride for n, stride in steps) + array.itemsize if array.size else 0
        return self.memory.add({0: array}, span, name, **options)

    def sparse(
        self, nbytes: int, pieces: Mapping[int, Array], name: str | None = None, **options: Any
    ) -> Buffer:
        """Register a huge buffer of which only the pieces, by byte offset, may be touched."""
        return self.memory.add(pieces, nbytes, name, **options)

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        cta: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        *,
        check: bool = True,
        ctas: range | None = None,
    ) -> Report:
        """Run a kernel; faults raise FaultError unless `check` is False.

        Arguments are buffers, `buffer + bytes`, None (a null pointer), numbers or bytes. Of a huge
        grid only `ctas`, counted along x first, may be run.
        """
        program = self.programs[name]
        grid, cta = _dim3(grid), _dim3(cta)
        params = _params(program, args)
        launch = Launch(
            program,
            grid,
            cta,
            params,
            shared_bytes,
            self.memory,
            self.symbols,
            FaultLog(name),
            self.max_steps,
        )
        threads, limits = launch.cta_threads, program.kernel.cta_limit
        if threads != limits.get("reqntid", threads) or threads > limits.get("maxntid", 1024):
            raise ValueError(f"{name} cannot run with CTAs of {threads} threads: {limits}")
        steps = _run(launch, ctas or range(math.prod(grid)), max(1, self.max_threads // threads))
        logs = {}
        for buffer in self.memory.buffers:
            for piece in buffer.pieces:
                logs[piece], piece.log = piece.log, []
                if buffer.conflicts:
                    kind, conflicts = Kind.GLOBAL_CONFLICT, find_conflicts(logs[piece], threads)
                    for conflict in conflicts:
                        _report(launch, kind, conflict, piece.base + conflict.offset, piece.name)
        report = Report(list(launch.faults), steps, logs)
        if check and report.faults:
            raise FaultError(report.faults)
        return report


@lru_cache(maxsize=4)
def _bind(ptx: str, kernels: tuple[str, ...] | None) -> tuple[Module, dict[str, Program]]:
    """Parse a text once: tests launch the same kernel many times, each on memory of its own."""
    module = parse(ptx)
    names = module.kernels if kernels is None else kernels
    return module, {name: bind(module.kernels[name], module) for name in names}


def _run(launch: Launch, ctas: range, at_once: int) -> int:
    """Run the CTAs, some at a time, and look for races in their shared memory."""
    steps = 0
    with np.errstate(all="ignore"):
        for first in ctas[::at_once]:
            machine = Machine(launch, first, min(at_once, ctas.stop - first))
            with suppress(StoppedError):
                machine.run()
            steps += machine.num_steps
            shared = machine.shared
            for conflict in find_conflicts(shared.log, launch.cta_threads):
                address = conflict.offset % shared.stride
                _report(launch, Kind.SHARED_RACE, conflict, address, shared.name)
    return steps


def _report(launch: Launch, kind: Kind, conflict: Conflict, address: int, name: str) -> None:
    line, thread, write = conflict.first
    other_line, other_thread, other_write = conflict.second
    cta, local = divmod(other_thread, launch.cta_threads)
    verbs = ["writes" if flag else "reads" for flag in (write, other_write)]
    message = (
        f"the thread {verbs[0]} {name} and, unordered, thread {local} of CTA {cta} "
        f"{verbs[1]} the same byte at PTX line {other_line}"
    )
    code, opcodes = launch.program.kernel.code, {"ld", "st", "atom", "red", "cp"}
    instruction = next(item for item in code if item.line == line and item.opcode in opcodes)
    launch.faults.add(make_fault(launch, kind, instruction, thread, message, address))


def _dim3(size: int | Sequence[int]) -> tuple[int, int, int]:
    numbers = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise ValueError(f"not the size of a grid or CTA: {size}")
    return (*numbers, 1, 1)[:3]  # type: ignore[return-value]


def _params(program: Program, args: Sequence[Any]) -> Array:
    params = program.kernel.params
    if len(args) != len(params):
        raise ValueError(f"{program.kernel.name} takes {len(params)} arguments, not {len(args)}")
    data = np.zeros(-(-program.param_bytes // 8) * 8, np.uint8)
    for param, value in zip(params, args, strict=True):
        start = program.param_offsets[param.name]
        data[start : start + param.nbytes] = np.frombuffer(_encode(param, value), np.uint8)
    return data


def _encode(param: Variable, value: Any) -> bytes:
    if isinstance(value, Buffer):
        value = value.address
    if value is None:
        value = 0
    if isinstance(value, float):
        return np.array(value, f"f{param.nbytes}").tobytes()
    if isinstance(value, int):
        if not -(1 << 8 * param.nbytes - 1) <= value < 1 << 8 * param.nbytes:
            raise ValueError(f"{value} does not fit into {param.nbytes} bytes of {param.name}")
        return (value % (1 << 8 * param.nbytes)).to_bytes(param.nbytes, "little")
    raw = value if isinstance(value, bytes) else np.asarray(value).tobytes()
    if len(raw) != param.nbytes:
        raise ValueError(f"{param.name} takes {param.nbytes} bytes, not {len(raw)}")
    return raw
