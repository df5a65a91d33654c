"""Binds loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import access, floats
from .arithmetic import last_type
from .faults import Kind
from .floats import Array
from .machine import Machine, Step, Threads
from .operands import address_reader, reader, writer
from .parser import Instruction, Vector
from .values import TYPES, UINT, Type

_SPACES = {"global", "shared", "local", "param", "const"}
# Weak or strong, cached or not: the value is the same. Strong accesses do not conflict with each
# other. Volatile ones count as weak: code that counts on them usually lacks a synchronisation.
_STRONG = {"relaxed", "acquire", "release", "acq_rel"}
_SCOPES = {"cta", "cluster", "gpu", "sys"}
_NEUTRAL = {"nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "weak", "volatile", *_SCOPES, *_STRONG}


def _space(instruction: Instruction, mods: tuple[str, ...], extra: set[str]) -> str:
    """The state space among the modifiers, or generic; refuses what is not neutral."""
    found = "generic"
    for mod in mods:
        name = mod.split("::")[0]
        if name in _SPACES and mod != "shared::cluster":
            found = name
        elif name not in ("L1", "L2") and mod not in _NEUTRAL | extra:
            raise instruction.unsupported(f"modifier {mod}")
    return found


def _strong(instruction: Instruction) -> bool:
    return bool(_STRONG & set(instruction.mods))


def _items(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _check_vector(instruction: Instruction, count: int) -> None:
    vectors = [int(mod[1:]) for mod in instruction.mods if mod in ("v2", "v4", "v8")]
    if count != (vectors or [1])[0]:
        raise instruction.unsupported("vector length")


def _all(m: Machine, threads: Threads) -> Array:
    return m.everyone if threads is None else threads


def load(instruction: Instruction, pc: int) -> Step:
    """Bind ld, from any space."""
    kind = last_type(instruction)
    space = _space(instruction, instruction.mods[:-1], {"v2", "v4", "v8"})
    targets = _items(instruction.operands[0])
    _check_vector(instruction, len(targets))
    raw = TYPES[f"s{8 * kind.nbytes}"] if kind.kind == "s" else TYPES[f"b{8 * kind.nbytes}"]
    writers = [writer(target, instruction, raw) for target in targets]
    address, strong = address_reader(instruction.operands[1], instruction), _strong(instruction)

    def step(m: Machine, threads: Threads) -> None:
        where = address(m, threads)
        if space == "param":
            if int(where.max()) + kind.nbytes * len(targets) > m.params.data.size:
                raise instruction.unsupported("address outside of the parameters")
            words = m.params.gather(
                m.params.data, where.astype(np.int64), kind.nbytes, len(targets)
            )
        else:
            who = _all(m, threads)
            where = np.broadcast_to(where, who.shape)
            words = access.load(
                m, instruction, space, who, where, kind.nbytes, len(targets), atomic=strong
            )
        for i, write in enumerate(writers):
            write(m, threads, raw.decode(words[:, i].copy()))

    return step


def store(instruction: Instruction, pc: int) -> Step:
    """Bind st, to any space but parameters."""
    kind = last_type(instruction)
    space = _space(instruction, instruction.mods[:-1], {"v2", "v4", "v8"})
    sources = _items(instruction.operands[1])
    _check_vector(instruction, len(sources))
    if space in ("param", "const"):
        raise instruction.unsupported()
    raw = TYPES[f"b{8 * kind.nbytes}"]
    readers = [reader(source, raw, instruction) for source in sources]
    address, strong = address_reader(instruction.operands[0], instruction), _strong(instruction)

    def step(m: Machine, threads: Threads) -> None:
        who = _all(m, threads)
        where = np.broadcast_to(address(m, threads), who.shape)
        words = np.empty((who.size, len(readers)), UINT[kind.nbytes])
        for i, read in enumerate(readers):
            words[:, i] = read(m, threads)
        access.store(m, instruction, space, who, where, words, atomic=strong)

    return step


def _increment(old: Array, value: Array) -> Array:
    return np.where(old >= value, old.dtype.type(0), old + old.dtype.type(1))


def _decrement(old: Array, value: Array) -> Array:
    return np.where((old == 0) | (old > value), value, old - old.dtype.type(1))


_ATOMICS: dict[str, Callable] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
    "inc": _increment,
    "dec": _decrement,
    "cas": lambda old, compare, value: np.where(old == compare, value, old),
}


def _atomic_function(instruction: Instruction, kind: Type) -> Callable:
    names = [mod for mod in instruction.mods if mod in _ATOMICS]
    if len(names) != 1 or kind.small or kind.lanes != 1:
        raise instruction.unsupported()
    if kind.kind == "f" and names[0] in ("min", "max"):
        return floats.minimum if names[0] == "min" else floats.maximum
    return _ATOMICS[names[0]]


def atomic(instruction: Instruction, pc: int) -> Step:
    """Bind atom and red: threads that meet at one address act in the order of their numbers."""
    kind = last_type(instruction)
    function = _atomic_function(instruction, kind)
    space = _space(instruction, instruction.mods[:-1], {*_ATOMICS, "noftz"})
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.opcode == "atom" else None
    address = address_reader(operands[0], instruction)
    readers = [reader(operand, kind, instruction) for operand in operands[1:]]
    write = writer(target, instruction, kind)

    def step(m: Machine, threads: Threads) -> None:
        who = _all(m, threads)
        where = np.broadcast_to(address(m, threads), who.shape)
        values = [np.broadcast_to(read(m, threads), who.shape) for read in readers]
        result = np.zeros(who.size, UINT[kind.nbytes])
        left = np.arange(who.size)
        while left.size:
            first = np.sort(np.unique(where[left], return_index=True)[1])
            now = left[first]
            args = (m, instruction, space, who[now], where[now])
            old = access.load(*args, kind.nbytes, 1, atomic=True)
            new = function(kind.decode(old[:, 0].copy()), *(value[now] for value in values))
            access.store(*args, kind.encode(new, kind.nbytes)[:, None], atomic=True)
            result[now] = old[:, 0]
            left = np.delete(left, first)
        write(m, threads, kind.decode(result))

    return step


def async_copy(instruction: Instruction, pc: int) -> Step:
    """Bind cp.async and its groups; cp.async.bulk and mbarriers are not supported."""
    mods = instruction.mods
    if mods[:1] != ("async",) or {"bulk", "mbarrier", "tensor"} & set(mods):
        raise instruction.unsupported()
    if mods[1] == "commit_group":

        def commit(m: Machine, threads: Threads) -> None:
            m.copies.committed[_all(m, threads)] += 1

        return commit
    if mods[1] in ("wait_group", "wait_all"):
        newest = instruction.operands[0].value if mods[1] == "wait_group" else None
        return lambda m, threads: m.copies.wait(m, _all(m, threads), newest)
    spaces = [mod.split("::")[0] for mod in mods[2:] if not mod.startswith("L2")]
    if spaces != ["shared", "global"]:
        raise instruction.unsupported()
    to, source = (address_reader(o, instruction) for o in instruction.operands[:2])
    nbytes = int(instruction.operands[2].value)
    word = TYPES["u32"]
    has_size = len(instruction.operands) > 3 and not any("cache_hint" in mod for mod in mods)
    if len(instruction.operands) > 4 or nbytes not in (4, 8, 16):
        raise instruction.unsupported()
    size = reader(instruction.operands[3 if has_size else 2], word, instruction)

    def start(m: Machine, threads: Threads) -> None:
        who = _all(m, threads)
        target, origin, sizes = (
            np.broadcast_to(read(m, threads), who.shape) for read in (to, source, size)
        )
        sizes = np.minimum(sizes, nbytes)
        m.copies.start(m, instruction, who, target, origin, nbytes, sizes)

    return start


def to_space(instruction: Instruction, pc: int) -> Step:
    """Bind cvta: between generic addresses and those of a space."""
    generic_source = instruction.mods[0] == "to"
    space = instruction.mods[1 if generic_source else 0].split("::")[0]
    if space not in access.WINDOWS and space != "param":
        raise instruction.unsupported()
    kind = last_type(instruction)
    window = access.WINDOWS.get(space, 0)
    delta = kind.constant(-window if generic_source else window)
    read = reader(instruction.operands[1], kind, instruction)
    write = writer(instruction.operands[0], instruction, kind)
    return lambda m, threads: write(m, threads, read(m, threads) + delta)


def trap(instruction: Instruction, pc: int) -> Step:
    """Bind trap."""

    def step(m: Machine, threads: Threads) -> list[tuple[int, Array]]:
        who = _all(m, threads)
        m.fault(Kind.TRAP, instruction, int(who[0]), "the kernel traps", count=who.size)
        return m.leave(threads)

    return step
