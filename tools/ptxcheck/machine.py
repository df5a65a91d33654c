"""Runs the threads of several CTAs in lock step, with one program counter for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from .access import AsyncCopies
from .faults import Fault, FaultLog, Kind
from .floats import Array
from .memory import RED_ZONE, GlobalMemory, Region, segments
from .parser import Instruction, Kernel, Symbol, Variable
from .values import UINT

Threads = Any  # indices of threads, or None for all of them
Step = Callable[["Machine", Threads], "list[tuple[int, Array]] | None"]


@dataclass
class Program:
    """A kernel bound to functions, with the layout of its variables and parameters."""

    kernel: Kernel
    steps: list[Step]
    shared: list[Variable]
    local: list[Variable]
    param_offsets: dict[str, int]
    param_bytes: int


@dataclass
class Launch:
    """What all chunks of one launch have in common."""

    program: Program
    grid: tuple[int, int, int]
    cta: tuple[int, int, int]
    params: Array
    shared_bytes: int
    memory: GlobalMemory
    symbols: dict[str, int]
    faults: FaultLog
    max_steps: int

    @property
    def cta_threads(self) -> int:
        """Threads of a CTA."""
        return math.prod(self.cta)


def layout(variables: list[Variable], dynamic: int) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Offsets of variables in shared or local memory, apart from each other, and their extents."""
    offsets, extents, end = {}, [], 0
    for variable in sorted(variables, key=lambda variable: variable.dynamic):
        align = max(variable.align, 16)
        start = -(-end // align) * align
        size = dynamic if variable.dynamic else variable.nbytes
        offsets[variable.name] = start
        extents.append((start, start + size))
        if not variable.dynamic:
            end = start + size + RED_ZONE
    return offsets, extents


class Machine:
    """The state of the threads of consecutive CTAs."""

    def __init__(self, launch: Launch, first_cta: int, num_ctas: int) -> None:
        self.launch, self.memory = launch, launch.memory
        self.num_ctas, self.cta_threads = num_ctas, launch.cta_threads
        self.num_threads = num_ctas * self.cta_threads
        self.first_thread = first_cta * self.cta_threads
        self.everyone = np.arange(self.num_threads)
        self.cta_of, self.thread_of = np.divmod(self.everyone, self.cta_threads)
        self.lane = self.thread_of % 32
        self.warps_per_cta = -(-self.cta_threads // 32)
        self.warp = self.cta_of * self.warps_per_cta + self.thread_of // 32
        self.registers: dict[str, Array] = {}
        self.alive = np.ones(self.num_threads, bool)
        self.waits_at = np.full(self.num_threads, -1)  # the pc of the barrier waited at
        self.needed = np.zeros(self.num_threads, np.uint64)  # lanes waited for
        self.cta_epochs = np.zeros(self.num_threads, np.int64)
        self.warp_epochs = np.zeros(self.num_threads, np.int64)
        self.parked: dict[int, Array] = {}
        self.on_release: dict[int, Callable[[Machine, Array], None]] = {}
        self.num_steps = 0
        self.symbols = dict(launch.symbols)
        self.shared = self._segments("shared memory", launch.program.shared, num_ctas)
        self.local = self._segments("local memory", launch.program.local, self.num_threads)
        self.params = Region("parameters", 0, launch.params)
        self.symbols.update(launch.program.param_offsets)
        self.copies = AsyncCopies(self)
        self._special: dict[str, Array] = {}

    def _segments(self, name: str, variables: list[Variable], count: int) -> Region:
        offsets, extents = layout(variables, self.launch.shared_bytes)
        self.symbols.update(offsets)
        nbytes = max((end for _, end in extents), default=0)
        return segments(name, count, extents, nbytes)

    def read(self, name: str, nbytes: int, threads: Threads) -> Array:
        """The bits of a register."""
        bits = self.registers.get(name)
        if bits is None:
            bits = np.zeros(self.num_threads, UINT[nbytes] if nbytes else bool)
            self.registers[name] = bits
        return bits if threads is None else bits[threads]

    def write(self, name: str, nbytes: int, threads: Threads, bits: Array) -> None:
        """Replace a register; arrays are never changed in place, so that they may be shared."""
        if threads is None:
            if bits.size != self.num_threads:
                bits = np.broadcast_to(bits, (self.num_threads,))
            self.registers[name] = bits
        else:
            changed = self.read(name, nbytes, None).copy()
            changed[threads] = bits
            self.registers[name] = changed

    def address(self, symbol: Symbol, instruction: Instruction) -> int:
        """The address of a variable in its own space."""
        if symbol.name not in self.symbols:
            raise instruction.unsupported(f"unknown symbol {symbol.name}")
        return self.symbols[symbol.name] + symbol.offset

    def special(self, name: str) -> Array | None:
        """A special register, or None if it is not known."""
        if name in ("%clock", "%clock64", "%clock_hi"):
            return np.full(self.num_threads, self.num_steps, np.uint64)
        if not self._special:
            self._fill_special()
        return self._special.get(name)

    def _fill_special(self) -> None:
        ctas = self.cta_of + self.first_thread // self.cta_threads
        table: dict[str, Any] = {"%laneid": self.lane, "%warpid": self.thread_of // 32}
        for prefix, linear, shape in (
            ("%tid", self.thread_of, self.launch.cta),
            ("%ctaid", ctas, self.launch.grid),
        ):
            size = {"%tid": "%ntid", "%ctaid": "%nctaid"}[prefix]
            for axis, extent in zip("xyz", shape, strict=True):
                table[f"{prefix}.{axis}"] = linear % extent
                table[f"{size}.{axis}"] = extent
                linear = linear // extent
        below = (1 << self.lane.astype(np.uint64)) - 1
        table["%nwarpid"] = self.warps_per_cta
        table["%lanemask_lt"], table["%lanemask_le"] = below, 2 * below + 1
        table["%lanemask_eq"] = below + 1
        table["%lanemask_ge"], table["%lanemask_gt"] = ~below, ~(2 * below + 1)
        for name, values in table.items():
            wide = np.asarray(values).astype(np.uint32)
            self._special[name] = np.broadcast_to(wide, (self.num_threads,)).copy()

    def fault(
        self,
        kind: Kind,
        instruction: Instruction,
        thread: int,
        message: str,
        address: int | None = None,
        count: int = 1,
    ) -> None:
        """Record a fault of a thread of this chunk."""
        self.launch.faults.add(
            make_fault(
                self.launch, kind, instruction, thread + self.first_thread, message, address, count
            )
        )

    def run(self) -> bool:
        """Run until all threads have exited; False if the rest can never run."""
        groups: dict[int, Threads] = {0: None}
        while True:
            while groups:
                pc = min(groups)
                threads = groups.pop(pc)
                if pc in self.parked:
                    threads = self._union(threads, self.parked.pop(pc))
                for target, moved in self._advance(pc, threads, min(groups, default=-1)):
                    if moved is None or moved.size:
                        both = target in groups
                        groups[target] = self._union(groups[target], moved) if both else moved
            if not (self.alive.any() and self._release_stuck_barriers(groups)):
                break
        return self._report_stuck()

    def _advance(self, pc: int, threads: Threads, limit: int) -> list[tuple[int, Threads]]:
        """Run a group until it branches, waits, exits or reaches the next group."""
        steps = self.launch.program.steps
        while True:
            self.num_steps += 1
            if self.num_steps > self.launch.max_steps:
                self._give_up(pc)
            moved = steps[pc](self, threads)
            if moved is not None:
                return moved
            pc += 1
            if pc == limit or pc in self.parked:
                return [(pc, threads)]

    def _give_up(self, pc: int) -> NoReturn:
        instruction = self.launch.program.kernel.code[pc]
        first = int(np.flatnonzero(self.alive)[0])
        self.fault(Kind.HANG, instruction, first, f"still running after {self.num_steps - 1} steps")
        raise StoppedError

    def _union(self, a: Threads, b: Threads) -> Threads:
        if a is None or b is None:
            return None
        both = np.union1d(a, b)
        return None if both.size == self.num_threads else both

    def leave(self, threads: Threads) -> list[tuple[int, Array]]:
        """Let threads exit."""
        self.alive[self.everyone if threads is None else threads] = False
        return []

    def arrive(self, pc: int, threads: Threads) -> list[tuple[int, Array]]:
        """Let threads wait at a barrier, and release the CTAs that are complete."""
        who = self.everyone if threads is None else threads
        self.waits_at[who] = pc
        there = np.bincount(self.cta_of[self.waits_at == pc], minlength=self.num_ctas)
        full = there == self.cta_threads
        if full.all():
            return self._release(pc, None)
        return self._release(pc, np.flatnonzero(full[self.cta_of])) if full.any() else []

    def _release(self, pc: int, threads: Threads) -> list[tuple[int, Array]]:
        who = self.everyone if threads is None else threads
        self.waits_at[who] = -1
        self.cta_epochs = self.cta_epochs.copy()
        self.cta_epochs[who] += 1
        if pc in self.on_release:
            self.on_release[pc](self, who)
        return [(pc + 1, threads)]

    def _release_stuck_barriers(self, groups: dict[int, Threads]) -> bool:
        """Release CTAs whose threads all wait or have exited, though not at one barrier."""
        waits = self.waits_at >= 0
        still = np.bincount(self.cta_of[self.alive & ~waits], minlength=self.num_ctas)
        there = np.bincount(self.cta_of[waits], minlength=self.num_ctas)
        for cta in np.flatnonzero((still == 0) & (there > 0)):
            first = cta * self.cta_threads
            inside = self.waits_at[first : first + self.cta_threads]
            pcs = np.unique(inside[inside >= 0])
            code = self.launch.program.kernel.code
            message = f"{there[cta]} of {self.cta_threads} threads wait"
            if pcs.size > 1:
                message += f" at PTX lines {[code[pc].line for pc in pcs]}"
            if there[cta] < self.cta_threads:
                message += ", the others have exited"
            waiting = int(first + np.flatnonzero(inside >= 0)[0])
            self.fault(Kind.DIVERGENT_BARRIER, code[pcs[0]], waiting, message)
            for pc in pcs:
                for target, moved in self._release(int(pc), first + np.flatnonzero(inside == pc)):
                    both = target in groups
                    groups[target] = self._union(groups[target], moved) if both else moved
        return bool(groups)

    def _report_stuck(self) -> bool:
        """Report threads that wait for others that never come."""
        code = self.launch.program.kernel.code
        for pc, threads in self.parked.items():
            if threads.size:
                message = "lanes named in the mask never execute this instruction"
                self.fault(
                    Kind.INACTIVE_LANE, code[pc], int(threads[0]), message, count=threads.size
                )
        for pc in np.unique(self.waits_at[self.waits_at >= 0]):
            threads = np.flatnonzero(self.waits_at == pc)
            message = "other threads of the CTA never arrive"
            self.fault(
                Kind.DIVERGENT_BARRIER, code[pc], int(threads[0]), message, count=threads.size
            )
        return not self.alive.any()


class StoppedError(Exception):
    """Raised within a launch that is given up."""


def make_fault(
    launch: Launch,
    kind: Kind,
    instruction: Instruction,
    thread: int,
    message: str,
    address: int | None = None,
    count: int = 1,
) -> Fault:
    """A fault of a thread given by its linear index in the grid."""
    cta, thread = divmod(thread, launch.cta_threads)
    where = []
    for linear, (x, y, _) in ((cta, launch.grid), (thread, launch.cta)):
        where.append((linear % x, linear // x % y, linear // (x * y)))
    name = launch.program.kernel.name
    line, text = instruction.line, instruction.text
    return Fault(kind, name, line, text, where[0], where[1], message, address, count)
