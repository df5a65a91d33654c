"""What a kernel can do wrong, and the record of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum


class Kind(str, Enum):
    """The kinds of faults."""

    OUT_OF_BOUNDS = "out of bounds"
    MISALIGNED = "misaligned"
    UNINITIALISED = "uninitialised read"
    ASYNC_READ = "access before cp.async completed"
    SHARED_RACE = "shared memory race"
    GLOBAL_CONFLICT = "global memory conflict"
    INACTIVE_LANE = "inactive lane"
    DIVERGENT_BARRIER = "divergent barrier"
    TRAP = "trap"
    HANG = "hang"


@dataclass(frozen=True)
class Fault:
    """The first occurrence of a fault at one PTX line, and how many more accesses did the same."""

    kind: Kind
    kernel: str
    line: int
    text: str
    cta: tuple[int, int, int]
    thread: tuple[int, int, int]
    message: str
    address: int | None = None
    count: int = 1

    def __str__(self) -> str:
        where = "" if self.address is None else f" at {self.address:#x}"
        return (
            f"{self.kind.value}{where}: {self.message} [{self.kernel}, PTX line {self.line}: "
            f"{self.text}; CTA {self.cta}, thread {self.thread}; {self.count} in all]"
        )


class UnsupportedInstruction(NotImplementedError):  # noqa: N818
    """An instruction, modifier or directive that this package does not execute."""

    def __init__(self, text: str, line: int, reason: str = "") -> None:
        super().__init__(f"PTX line {line}: {text}" + (f" ({reason})" if reason else ""))
        self.text, self.line = text, line


class PtxSyntaxError(ValueError):
    """Text that is not PTX as compilers write it."""


class FaultError(AssertionError):
    """Raised by a checked launch that recorded faults."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


class FaultLog:
    """Collects faults, one for each kind and PTX line."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self._faults: dict[tuple[Kind, int], Fault] = {}

    def add(self, fault: Fault) -> None:
        """Record a fault, or count it where its kind and line are known already."""
        key = (fault.kind, fault.line)
        known = self._faults.get(key)
        if known is not None:
            fault = replace(known, count=known.count + fault.count)
        self._faults[key] = fault

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults.values())
