"""Instructions by which the lanes of a warp exchange values or wait for each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import access
from .arithmetic import last_type
from .faults import Kind
from .floats import Array
from .machine import Machine, Step, Threads
from .operands import address_reader, reader, writer
from .parser import Instruction, Vector
from .values import TYPES

_FULL = 0xFFFFFFFF


def converge(
    m: Machine, instruction: Instruction, pc: int, threads: Threads, masks: Array
) -> tuple[Threads, bool]:
    """The threads whose mask is complete here; the others are parked until it is.

    A lane in the mask that has exited before is not waited for.
    """
    if threads is None and (masks == _FULL).all():
        m.warp_epochs = m.warp_epochs + 1
        return None, True
    who = m.everyone if threads is None else threads
    masks = np.broadcast_to(masks, who.shape).astype(np.uint64)
    bit = np.uint64(1) << m.lane.astype(np.uint64)
    outside = (masks & bit[who]) == 0
    if outside.any():
        message = "the executing lane is not in its own mask"
        m.fault(Kind.INACTIVE_LANE, instruction, int(who[outside][0]), message)
    here, alive = _lanes(m, who), _lanes(m, np.flatnonzero(m.alive))
    need = m.needed[who] | (masks & alive[m.warp[who]])
    ready = (need & ~here[m.warp[who]]) == 0
    m.needed[who] = np.where(ready, np.uint64(0), need)
    if not ready.all():
        m.parked[pc] = who[~ready]
    who = who[ready]
    whole = _lanes(m, who) == alive  # all lanes not exited take part
    m.warp_epochs = m.warp_epochs + whole[m.warp]
    return who, bool(ready.all())


def _lanes(m: Machine, threads: Array) -> Array:
    """For each warp a mask of the lanes among `threads`."""
    weights = np.exp2(m.lane[threads])
    count = m.num_ctas * m.warps_per_cta
    return np.bincount(m.warp[threads], weights=weights, minlength=count).astype(np.uint64)


def _synchronised(
    instruction: Instruction, pc: int, mask: Callable, act: Callable[[Machine, Threads], None]
) -> Step:
    def step(m: Machine, threads: Threads) -> list[tuple[int, Array]] | None:
        ready, complete = converge(m, instruction, pc, threads, mask(m, threads))
        if ready is None or ready.size:
            act(m, ready)
        return None if complete else [(pc + 1, ready)]

    return step


def warp_barrier(instruction: Instruction, pc: int) -> Step:
    """bar.warp.sync."""
    mask = reader(instruction.operands[0], TYPES["u32"], instruction)
    return _synchronised(instruction, pc, mask, lambda m, threads: None)


def shuffle(instruction: Instruction, pc: int) -> Step:
    """shfl.sync."""
    mods = instruction.mods
    if len(mods) != 3 or mods[0] != "sync" or mods[2] != "b32" or len(instruction.operands) != 5:
        raise instruction.unsupported()
    mode, word = mods[1], TYPES["u32"]
    target = instruction.operands[0]
    targets = target.items if isinstance(target, Vector) else (target, None)
    write, write_pred = writer(targets[0], instruction), writer(targets[1], instruction)
    value, count, clamp, mask = (reader(o, word, instruction) for o in instruction.operands[1:])

    def act(m: Machine, threads: Threads) -> None:
        who = m.everyone if threads is None else threads
        lane = m.lane[who]
        source, inside = _source(mode, lane, count(m, threads), clamp(m, threads))
        active = np.zeros(m.num_threads + 32, bool)
        active[who] = True
        index = who - lane + source
        masks = np.broadcast_to(mask(m, threads), who.shape)
        good = active[index] & ((masks >> source.astype(np.uint32)) & 1).astype(bool)
        index = np.minimum(index, m.num_threads - 1)
        good &= m.warp[index] == m.warp[who]
        values = value(m, None)
        values = np.broadcast_to(values, (m.num_threads,))[index]
        if not good.all():
            message = f"the shuffle reads lane {source[~good][0]}, which does not take part"
            first = int(who[~good][0])
            m.fault(Kind.INACTIVE_LANE, instruction, first, message, count=int((~good).sum()))
            values = np.where(good, values, np.uint32(_FULL))  # a NaN, so that it is seen
        write(m, threads, values)
        write_pred(m, threads, inside)

    return _synchronised(instruction, pc, mask, act)


def _source(mode: str, lane: Array, count: Array, clamp: Array) -> tuple[Array, Array]:
    """The lane to read from, and whether it lies in the segment."""
    count, limit, segment = (x.astype(np.int64) for x in (count & 31, clamp & 31, clamp >> 8 & 31))
    last = (lane & segment) | (limit & ~segment)
    if mode == "up":
        source = lane - count
        inside = source >= last
    elif mode in ("down", "bfly"):
        source = lane + count if mode == "down" else lane ^ count
        inside = source <= last
    else:
        source = (lane & segment) | (count & ~segment)
        inside = source <= last
    return np.where(inside, source, lane), inside


def _groups(m: Machine, who: Array, masks: Array) -> tuple[Array, int]:
    """Number the sets of threads that share a warp and a mask."""
    keys = m.warp[who].astype(np.uint64) << np.uint64(32) | masks.astype(np.uint64)
    unique, inverse = np.unique(keys, return_inverse=True)
    return inverse.reshape(-1), unique.size


def vote(instruction: Instruction, pc: int) -> Step:
    """vote.sync.all, any, uni and ballot."""
    mods = instruction.mods
    if len(mods) != 3 or mods[0] != "sync" or mods[1] not in ("all", "any", "uni", "ballot"):
        raise instruction.unsupported()
    write = writer(instruction.operands[0], instruction)
    pred = reader(instruction.operands[1], TYPES["pred"], instruction)
    mask = reader(instruction.operands[2], TYPES["u32"], instruction)

    def act(m: Machine, threads: Threads) -> None:
        who = m.everyone if threads is None else threads
        votes = np.broadcast_to(pred(m, threads), who.shape)
        group, count = _groups(m, who, np.broadcast_to(mask(m, threads), who.shape))
        bits = np.bincount(group, np.exp2(m.lane[who]) * votes, count).astype(np.uint32)
        yes, total = np.bincount(group, votes, count), np.bincount(group, minlength=count)
        result = {
            "all": yes == total,
            "any": yes > 0,
            "uni": (yes == total) | (yes == 0),
            "ballot": bits,
        }[mods[1]]
        write(m, threads, result[group])

    return _synchronised(instruction, pc, mask, act)


_REDUCE = {
    "add": (np.add, lambda info: 0),
    "min": (np.minimum, lambda info: info.max),
    "max": (np.maximum, lambda info: info.min),
    "and": (np.bitwise_and, lambda info: info.max),
    "or": (np.bitwise_or, lambda info: 0),
    "xor": (np.bitwise_xor, lambda info: 0),
}


def reduce(instruction: Instruction, pc: int) -> Step:
    """redux.sync on 32-bit integers."""
    kind = last_type(instruction)
    if len(instruction.mods) != 3 or instruction.mods[1] not in _REDUCE or kind.kind == "f":
        raise instruction.unsupported()
    function, start = _REDUCE[instruction.mods[1]]
    write = writer(instruction.operands[0], instruction)
    value = reader(instruction.operands[1], kind, instruction)
    mask = reader(instruction.operands[2], TYPES["u32"], instruction)

    def act(m: Machine, threads: Threads) -> None:
        who = m.everyone if threads is None else threads
        values = np.broadcast_to(value(m, threads), who.shape)
        group, count = _groups(m, who, np.broadcast_to(mask(m, threads), who.shape))
        result = np.full(count, start(np.iinfo(values.dtype)), values.dtype)
        function.at(result, group, values)
        write(m, threads, kind.encode(result[group], 4))

    return _synchronised(instruction, pc, mask, act)


def load_matrix(instruction: Instruction, pc: int) -> Step:
    """ldmatrix of 8 x 8 matrices of 16 bits from shared memory, not transposed.

    Lane 8 * i + r holds the address of row r of matrix i; lane 4 * r + c receives two entries.
    """
    mods = [mod.split("::")[0] for mod in instruction.mods]
    targets = instruction.operands[0].items
    shape = ["sync", "aligned", "m8n8", f"x{len(targets)}", "shared", "b16"]
    if mods != shape or len(targets) not in (1, 2, 4):
        raise instruction.unsupported()
    writers = [writer(target, instruction) for target in targets]
    address = address_reader(instruction.operands[1], instruction)

    def act(m: Machine, threads: Threads) -> None:
        who = m.everyone if threads is None else threads
        rows = np.zeros(m.num_threads, np.uint64)
        rows[who] = address(m, threads)
        lane = m.lane[who]
        for i, write in enumerate(writers):
            row = rows[who - lane + 8 * i + lane // 4]
            skewed = row % np.uint64(16) != 0
            if skewed.any():
                first = int(who[skewed][0])
                m.fault(Kind.MISALIGNED, instruction, first, "16-byte row", int(row[skewed][0]))
            where = row - row % np.uint64(4) + (4 * (lane % 4)).astype(np.uint64)
            words = access.load(m, instruction, "shared", who, where, 4, 1)
            write(m, threads, words[:, 0].copy())

    def mask(m: Machine, threads: Threads) -> Array:
        return np.array([_FULL], np.uint32)

    return _synchronised(instruction, pc, mask, act)


def active_mask(instruction: Instruction, pc: int) -> Step:
    """Activemask: the lanes that execute it together here."""
    write = writer(instruction.operands[0], instruction)

    def step(m: Machine, threads: Threads) -> None:
        who = m.everyone if threads is None else threads
        write(m, threads, _lanes(m, who)[m.warp[who]].astype(np.uint32))

    return step
