"""Finds accesses to the same byte that nothing orders, from the log of accesses of a launch.

Two accesses by different threads conflict if at least one writes, not both are atomic, and
- for threads of different CTAs: always (only the end of a launch orders CTAs);
- for threads of one CTA: if both happen between the same two barriers of the CTA, and
- for threads of one warp: if both also happen between the same two warp synchronisations, that
  is `bar.warp.sync`, `shfl.sync`, `vote.sync` or `redux.sync` by all lanes not exited.

Threads of a CTA that store one value to one address of shared memory in one instruction count
as a single thread. Fences and atomics order nothing here: a kernel whose last CTA reads what
the others wrote needs its buffer registered with `conflicts=False`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .floats import Array
from .memory import Access


@dataclass(frozen=True)
class Conflict:
    """Two accesses, as (PTX line, linear thread, whether it writes), to one byte offset."""

    offset: int
    first: tuple[int, int, bool]
    second: tuple[int, int, bool]


def granule(log: list[Access]) -> int:
    """The largest number of bytes that divides all accesses."""
    size = 0
    for access in log:
        size = math.gcd(size, access.nbytes, int(np.bitwise_or.reduce(access.offsets)))
    return max(size & -size, 1)


def count_loads(log: list[Access], nbytes: int) -> Array:
    """How many times each byte was loaded."""
    reads = [access for access in log if not access.write and access.offsets.size]
    if not reads:
        return np.zeros(nbytes, np.int64)
    size = granule(reads)
    total = np.zeros(-(-nbytes // size), np.int64)
    for access in reads:
        for part in range(0, access.nbytes, size):
            index = (access.offsets + part) // size
            total += np.bincount(index, minlength=total.size)
    return np.repeat(total, size)[:nbytes]


def find_conflicts(log: list[Access], cta_threads: int) -> Iterator[Conflict]:
    """Yield one conflict for each pair of lines and each of the three rules."""
    log = [access for access in log if access.offsets.size]
    if not any(access.write for access in log):
        return
    table = _Table(log, cta_threads)
    place = table.granules
    rules = (
        ((place,), table.threads // cta_threads),
        ((place, table.cta_epochs), table.warps),
        ((place, table.cta_epochs, table.warp_epochs, table.warps), table.threads),
    )
    for keys, actors in rules:
        yield from table.mixed(keys, actors)


class _Table:
    """One row for each access to a granule that somebody writes."""

    def __init__(self, log: list[Access], cta_threads: int) -> None:
        self.size = granule(log)
        touched = max(int(access.offsets.max()) + access.nbytes for access in log)
        written = np.zeros(touched // self.size + 1, bool)
        for access in log:
            if access.write:
                for part in range(0, access.nbytes, self.size):
                    written[(access.offsets + part) // self.size] = True
        columns: list[tuple[Array, ...]] = []
        for access in log:
            for part in range(0, access.nbytes, self.size):
                places = (access.offsets + part) // self.size
                keep = np.flatnonzero(written[places])
                flags = np.full(keep.size, access.write), np.full(keep.size, access.atomic)
                epochs = access.cta_epochs[keep], access.warp_epochs[keep]
                lines = np.full(keep.size, access.line)
                columns.append((places[keep], access.threads[keep], *epochs, *flags, lines))
        joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
        self.granules, self.threads, self.cta_epochs, self.warp_epochs = joined[:4]
        self.write, self.atomic, self.lines = joined[4:]
        per_cta = -(-cta_threads // 32)
        cta, thread = np.divmod(self.threads, cta_threads)
        self.warps = cta * per_cta + thread // 32

    def mixed(self, keys: tuple[Array, ...], actors: Array) -> Iterator[Conflict]:
        """Conflicts between different actors in a group of equal keys."""
        order = np.lexsort(keys[::-1])
        changes = np.zeros(order.size, bool)
        for key in keys:
            sorted_key = key[order]
            changes[1:] |= sorted_key[1:] != sorted_key[:-1]
        changes[0] = True
        starts = np.flatnonzero(changes)
        who = actors[order]
        several = np.minimum.reduceat(who, starts) != np.maximum.reduceat(who, starts)
        several &= np.logical_or.reduceat(self.write[order], starts)
        several &= np.logical_or.reduceat(~self.atomic[order], starts)
        ends = np.append(starts[1:], order.size)
        seen: set[tuple[int, int]] = set()
        for group in np.flatnonzero(several)[:1000]:
            rows = order[starts[group] : ends[group]]
            conflict = self._pair(rows, actors)
            if conflict and (conflict.first[0], conflict.second[0]) not in seen:
                seen.add((conflict.first[0], conflict.second[0]))
                yield conflict

    def _pair(self, rows: Array, actors: Array) -> Conflict | None:
        """Two rows of a group that conflict, if there are any."""
        for i in rows[self.write[rows]]:
            others = rows[(actors[rows] != actors[i]) & ~(self.atomic[rows] & self.atomic[i])]
            if others.size:
                j = others[0]
                first, second = (i, j) if i < j or not self.write[j] else (j, i)
                offset = int(self.granules[i]) * self.size
                return Conflict(offset, self._describe(first), self._describe(second))
        return None

    def _describe(self, row: int) -> tuple[int, int, bool]:
        return int(self.lines[row]), int(self.threads[row]), bool(self.write[row])
