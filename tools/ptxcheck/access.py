"""Loads and stores of many threads at once, with the checks that find memory faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .faults import Kind
from .floats import Array
from .memory import LOCAL_WINDOW, SHARED_WINDOW, Access, Region
from .parser import Instruction
from .values import UINT

if TYPE_CHECKING:
    from .machine import Machine

WINDOWS = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


def load(
    m: Machine,
    instruction: Instruction,
    space: str,
    threads: Array,
    addresses: Array,
    nbytes: int,
    count: int,
    *,
    atomic: bool = False,
) -> Array:
    """Words of shape (threads, count); zero where the access is faulty."""
    whole = None
    parts = _parts(m, instruction, space, threads, addresses, nbytes, count, write=False)
    for region, offsets, rows in parts:
        who = threads if rows is None else threads[rows]
        good = region.all_set(region.written, offsets, nbytes, count)
        if good is not None:
            where = addresses if rows is None else addresses[rows]
            message = f"nobody wrote these bytes of {region.name}"
            _fault(m, instruction, Kind.UNINITIALISED, who[~good], where[~good], message)
        _check_pending(m, instruction, region, who, offsets, nbytes, count)
        _log(m, instruction, region, who, offsets, nbytes * count, write=False, atomic=atomic)
        words = region.gather(region.data, offsets, nbytes, count)
        if rows is None:
            return words
        if whole is None:
            whole = np.zeros((threads.size, count), UINT[nbytes])
        whole[rows] = words
    return np.zeros((threads.size, count), UINT[nbytes]) if whole is None else whole


def store(
    m: Machine,
    instruction: Instruction,
    space: str,
    threads: Array,
    addresses: Array,
    words: Array,
    *,
    atomic: bool = False,
) -> None:
    """Write words of shape (threads, count)."""
    nbytes, count = words.dtype.itemsize, words.shape[1]
    parts = _parts(m, instruction, space, threads, addresses, nbytes, count, write=True)
    for region, offsets, rows in parts:
        who = threads if rows is None else threads[rows]
        values = words if rows is None else words[rows]
        _check_pending(m, instruction, region, who, offsets, nbytes, count)
        commit(m, instruction, region, who, offsets, values, atomic=atomic)


def commit(
    m: Machine,
    instruction: Instruction,
    region: Region,
    threads: Array,
    offsets: Array,
    words: Array,
    *,
    atomic: bool = False,
) -> None:
    """Write checked words and log the write."""
    nbytes, count = words.dtype.itemsize, words.shape[1]
    region.scatter(region.data, offsets, words)
    region.mark(region.written, offsets, nbytes, count, 1)
    if region is m.shared and not atomic:
        # Threads that store one value to one address at once, as Triton's reductions do, count
        # as one thread.
        order = np.lexsort((*words.T, offsets))
        same = (words[order][1:] == words[order][:-1]).all(axis=1)
        same &= offsets[order][1:] == offsets[order][:-1]
        if same.any():
            first = np.sort(order[np.append(True, ~same)])
            threads, offsets = threads[first], offsets[first]
    _log(m, instruction, region, threads, offsets, nbytes * count, write=True, atomic=atomic)


def _parts(
    m: Machine,
    instruction: Instruction,
    space: str,
    threads: Array,
    addresses: Array,
    nbytes: int,
    count: int,
    *,
    write: bool,
) -> Iterator[tuple[Region, Array, Array | None]]:
    """Split an access by region into flat offsets and rows, leaving out what is faulty."""
    width = nbytes * count
    rows: Array | None = None
    align = width & -width  # only cp.async has widths that are not powers of two
    skewed = (addresses & np.uint64(align - 1)) != 0
    if skewed.any():
        message = f"{width}-byte access"
        _fault(m, instruction, Kind.MISALIGNED, threads[skewed], addresses[skewed], message)
        rows = np.flatnonzero(~skewed)
    for region, some in _regions(m, space, addresses if rows is None else addresses[rows]):
        picked = rows if some is None else some if rows is None else rows[some]
        who, where = (
            (threads, addresses) if picked is None else (threads[picked], addresses[picked])
        )
        if region is None:
            message = m.memory.describe(int(where[0]))
            _fault(m, instruction, Kind.OUT_OF_BOUNDS, who, where, message)
            continue
        offsets, good = _offsets(m, region, who, where, width)
        if write and region.read_only:
            good = np.zeros(who.size, bool)
        if good is not None and not good.all():
            message = _describe(m, region, int(where[~good][0]))
            _fault(m, instruction, Kind.OUT_OF_BOUNDS, who[~good], where[~good], message)
            picked = np.flatnonzero(good) if picked is None else picked[good]
            offsets = offsets[good]
        valid = region.all_set(region.valid, offsets, nbytes, count)
        if valid is not None:
            picked = np.arange(threads.size) if picked is None else picked
            bad = picked[~valid]
            message = _describe(m, region, int(addresses[bad[0]]))
            _fault(m, instruction, Kind.OUT_OF_BOUNDS, threads[bad], addresses[bad], message)
            picked, offsets = picked[valid], offsets[valid]
        if offsets.size:
            yield region, offsets, picked


def _regions(
    m: Machine, space: str, addresses: Array
) -> Iterator[tuple[Region | None, Array | None]]:
    if not addresses.size:
        return
    if space == "shared":
        yield m.shared, None
    elif space == "local":
        yield m.local, None
    elif space in ("global", "const"):
        yield from m.memory.find(addresses)
    else:
        window = addresses >> np.uint64(60)
        shared, local = window == SHARED_WINDOW >> 60, window == LOCAL_WINDOW >> 60
        for name, inside in (("shared", shared), ("local", local), ("global", ~shared & ~local)):
            rows = np.flatnonzero(inside)
            for region, some in _regions(m, name, addresses[rows]):
                yield region, rows if some is None else rows[some]


def _offsets(
    m: Machine, region: Region, threads: Array, addresses: Array, width: int
) -> tuple[Array, Array | None]:
    """Flat offsets in the region, and which of them are inside."""
    if region is m.shared or region is m.local:
        # A generic address still carries its window, a plain one may have wrapped below zero.
        window = SHARED_WINDOW if region is m.shared else LOCAL_WINDOW
        generic = (addresses >> np.uint64(60)) == np.uint64(window >> 60)
        local = np.where(generic, addresses - np.uint64(window), addresses)
        owners = m.cta_of[threads] if region is m.shared else threads
        stride = region.stride
        good = (local < np.uint64(stride)) & (local + np.uint64(width) <= np.uint64(stride))
        return np.where(good, local, np.uint64(0)).astype(np.int64) + owners * stride, good
    offsets = (addresses - np.uint64(region.base)).astype(np.int64)
    inside = offsets + width <= region.data.size
    return offsets, None if inside.all() else inside


def _describe(m: Machine, region: Region, address: int) -> str:
    if region is m.shared:
        return f"byte {address} of shared memory"
    if region is m.local:
        return f"byte {address} of local memory"
    if region.read_only:
        return f"{region.name} is read only"
    return m.memory.describe(address)


def _check_pending(
    m: Machine,
    instruction: Instruction,
    region: Region,
    threads: Array,
    offsets: Array,
    nbytes: int,
    count: int,
) -> None:
    if region.pending is None or not m.copies:
        return
    busy = region.gather(region.pending, offsets, nbytes, count).any(axis=1)
    if busy.any():
        _fault(m, instruction, Kind.ASYNC_READ, threads[busy], None, "no wait_group came before")


def _fault(
    m: Machine,
    instruction: Instruction,
    kind: Kind,
    threads: Array,
    addresses: Array | None,
    message: str,
) -> None:
    address = None if addresses is None else int(addresses[0])
    m.fault(kind, instruction, int(threads[0]), message, address, threads.size)


def _log(
    m: Machine,
    instruction: Instruction,
    region: Region,
    threads: Array,
    offsets: Array,
    nbytes: int,
    *,
    write: bool,
    atomic: bool,
) -> None:
    if region is m.local:
        return
    every = threads is m.everyone
    epochs = (m.cta_epochs, m.warp_epochs)
    cta, warp = epochs if every else (epoch[threads] for epoch in epochs)
    linear = threads + m.first_thread
    line = instruction.line
    region.log.append(Access(line, offsets, nbytes, linear, cta, warp, write, atomic))


class AsyncCopies:
    """The state of `cp.async`: data read at the start, written when a thread waits for it."""

    def __init__(self, m: Machine) -> None:
        self.committed = np.zeros(m.num_threads, np.int64)
        self._open: list[tuple[Instruction, Array, Array, Array, Array]] = []

    def __bool__(self) -> bool:
        return bool(self._open)

    def start(
        self,
        m: Machine,
        instruction: Instruction,
        threads: Array,
        to: Array,
        source: Array,
        nbytes: int,
        sizes: Array,
    ) -> None:
        """Read `sizes` bytes and zeros up to `nbytes`; mark the destination as pending.

        A copy of some of the bytes counts as a read of all, as compute-sanitizer has it.
        """
        data = np.zeros((threads.size, nbytes), np.uint8)
        for size in np.unique(sizes):
            some = np.flatnonzero(sizes == size)
            if size:
                where = threads[some], source[some], 4, nbytes // 4
                read = load(m, instruction, "global", *where).view(np.uint8)
                data[some, : int(size)] = read[:, : int(size)]
        words = data.view(np.uint32)
        parts = _parts(m, instruction, "shared", threads, to, 4, words.shape[1], write=True)
        for region, offsets, rows in parts:
            who = threads if rows is None else threads[rows]
            _check_pending(m, instruction, region, who, offsets, 4, words.shape[1])
            region.mark(region.pending, offsets, 4, words.shape[1], 1)
            _log(m, instruction, region, who, offsets, nbytes, write=True, atomic=False)
            values = words if rows is None else words[rows]
            self._open.append((instruction, who, offsets, values, self.committed[who]))

    def wait(self, m: Machine, threads: Array, newest: int | None) -> None:
        """Finish all but the newest groups of these threads; None finishes everything."""
        waiting = np.zeros(m.num_threads, bool)
        waiting[threads] = True
        left = []
        for instruction, who, offsets, words, groups in self._open:
            limit = self.committed[who] - (newest or 0)
            done = waiting[who] & ((groups < limit) if newest is not None else True)
            rows = np.flatnonzero(done)
            if rows.size:
                m.shared.mark(m.shared.pending, offsets[rows], 4, words.shape[1], 0)
                commit(m, instruction, m.shared, who[rows], offsets[rows], words[rows])
            if rows.size < who.size:
                keep = np.flatnonzero(~done)
                entry = (instruction, who[keep], offsets[keep], words[keep], groups[keep])
                left.append(entry)
        self._open = left
