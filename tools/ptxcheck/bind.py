"""Turns a parsed kernel into a program: one function for each instruction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import arithmetic, conversions, memory_ops, warp
from .arithmetic import Signature, last_type
from .floats import Array
from .machine import Machine, Program, Step, Threads
from .operands import reader, writer
from .parser import Address, Instruction, Kernel, Module, Reg, Symbol, Vector
from .values import TYPES, UINT, Type


def bind(kernel: Kernel, module: Module) -> Program:
    """Bind a kernel; an instruction that is not supported fails here."""
    steps = [_step(instruction, pc, kernel) for pc, instruction in enumerate(kernel.code)]
    used = {symbol for instruction in kernel.code for symbol in _symbols(instruction)}
    outer = [variable for variable in module.variables if variable.name in used]
    shared = [v for v in (*kernel.variables, *outer) if v.space == "shared"]
    local = [v for v in kernel.variables if v.space == "local"]
    offsets, end = {}, 0
    for param in kernel.params:
        end = -(-end // param.align) * param.align
        offsets[param.name] = end
        end += param.nbytes
    steps.append(lambda m, threads: m.leave(threads))
    return Program(kernel, steps, shared, local, offsets, end)


def _symbols(instruction: Instruction) -> set[str]:
    names = set()
    for operand in instruction.operands:
        base = operand.base if isinstance(operand, Address) else operand
        if isinstance(base, Symbol):
            names.add(base.name)
    return names


def _step(instruction: Instruction, pc: int, kernel: Kernel) -> Step:
    try:
        step = _bind(instruction, pc, kernel)
    except (IndexError, AttributeError) as error:
        raise instruction.unsupported("operands") from error
    if instruction.guard is None:
        return step
    test = reader(instruction.guard, TYPES["pred"], instruction)

    def guarded(m: Machine, threads: Threads) -> list[tuple[int, Array]] | None:
        truth = test(m, threads)
        if truth.all():
            return step(m, threads)
        if not truth.any():
            return None
        who = m.everyone if threads is None else threads
        moved = step(m, who[truth])
        return None if moved is None else [*moved, (pc + 1, who[~truth])]

    return guarded


def _bind(instruction: Instruction, pc: int, kernel: Kernel) -> Step:
    opcode = instruction.opcode
    if opcode == "bra":
        return _branch(instruction, kernel)
    if opcode == "mov":
        return _move(instruction)
    if opcode == "cvt":
        return _compute(instruction, conversions.signature(instruction))
    signature = arithmetic.signature(instruction)
    if signature is not None:
        return _compute(instruction, signature)
    if opcode not in _BINDERS:
        raise instruction.unsupported("opcode")
    return _BINDERS[opcode](instruction, pc)


def _compute(instruction: Instruction, signature: Signature) -> Step:
    """Read the operands, compute, write the results."""
    target, *sources = instruction.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    if len(sources) != len(signature.operands) or len(targets) > len(signature.results):
        raise instruction.unsupported("number of operands")
    pairs = zip(sources, signature.operands, strict=True)
    readers = [reader(source, kind, instruction) for source, kind in pairs]
    writers = [
        writer(target, instruction, kind)
        for target, kind in zip(targets, signature.results, strict=False)
    ]
    function = signature.function

    def step(m: Machine, threads: Threads) -> None:
        result = function(*[read(m, threads) for read in readers])
        if isinstance(result, tuple):
            for write, values in zip(writers, result, strict=False):
                write(m, threads, values)
        else:
            writers[0](m, threads, np.asarray(result))

    return step


def _move(instruction: Instruction) -> Step:
    """Bind mov, which also packs and unpacks vectors."""
    kind = last_type(instruction)
    if len(instruction.mods) != 1:
        raise instruction.unsupported()
    target, source = instruction.operands
    bits = kind if kind.kind == "pred" else TYPES[f"b{8 * kind.nbytes}"]
    if isinstance(target, Vector):
        return _unpack(instruction, target, bits)
    if isinstance(source, Vector):
        return _pack(instruction, source, bits)
    # Floating-point constants need the type of the move, registers only its width.
    read = reader(source, bits if isinstance(source, Reg) else kind, instruction)
    write = writer(target, instruction, bits if isinstance(source, Reg) else kind)
    return lambda m, threads: write(m, threads, read(m, threads))


def _unpack(instruction: Instruction, target: Vector, bits: Type) -> Step:
    part = bits.nbytes // len(target.items)
    writers = [writer(item, instruction, TYPES[f"b{8 * part}"]) for item in target.items]
    read = reader(instruction.operands[1], bits, instruction)

    def step(m: Machine, threads: Threads) -> None:
        words = np.ascontiguousarray(read(m, threads)).view(UINT[part]).reshape(-1, len(writers))
        for i, write in enumerate(writers):
            write(m, threads, words[:, i].copy())

    return step


def _pack(instruction: Instruction, source: Vector, bits: Type) -> Step:
    part = TYPES[f"b{8 * bits.nbytes // len(source.items)}"]
    readers = [reader(item, part, instruction) for item in source.items]
    write = writer(instruction.operands[0], instruction, bits)

    def step(m: Machine, threads: Threads) -> None:
        words = np.stack(np.broadcast_arrays(*(read(m, threads) for read in readers)), axis=1)
        write(m, threads, words.view(UINT[bits.nbytes]).reshape(-1))

    return step


def _branch(instruction: Instruction, kernel: Kernel) -> Step:
    label = instruction.operands[0]
    if not isinstance(label, Symbol) or label.name not in kernel.labels:
        raise instruction.unsupported("label")
    target = kernel.labels[label.name]
    return lambda m, threads: [(target, threads)]


def _leave(instruction: Instruction, pc: int) -> Step:
    return lambda m, threads: m.leave(threads)


def _nothing(instruction: Instruction, pc: int) -> Step:
    """Instructions without an effect on one thread's values: caches, fences, hints."""
    return lambda m, threads: None


def _policy(instruction: Instruction, pc: int) -> Step:
    write = writer(instruction.operands[0], instruction)
    return lambda m, threads: write(m, threads, np.zeros(1, np.uint64))


def _barrier(instruction: Instruction, pc: int) -> Step:
    """Bind bar.sync, bar.warp.sync and bar.red."""
    mods = set(instruction.mods)
    if instruction.mods == ("warp", "sync"):
        return warp.warp_barrier(instruction, pc)
    if "red" in mods:
        return _reducing_barrier(instruction, pc)
    if "sync" not in mods or mods - {"sync", "cta", "aligned"}:
        raise instruction.unsupported()
    return _wait(instruction, pc, instruction.operands[1:2])


def _wait(instruction: Instruction, pc: int, count: tuple | list) -> Step:
    word = TYPES["u32"]
    counts = [reader(operand, word, instruction) for operand in count]

    def step(m: Machine, threads: Threads) -> list[tuple[int, Array]] | None:
        if any((read(m, threads) != m.cta_threads).any() for read in counts):
            raise instruction.unsupported("barrier for a part of the CTA")
        return m.arrive(pc, threads)

    return step


def _reducing_barrier(instruction: Instruction, pc: int) -> Step:
    mods = set(instruction.mods) - {"red", "cta", "aligned", "u32", "pred"}
    if mods not in ({"popc"}, {"and"}, {"or"}):
        raise instruction.unsupported()
    target, *operands = instruction.operands
    wait = _wait(instruction, pc, operands[1:-1])
    pred = reader(operands[-1], TYPES["pred"], instruction)
    write = writer(target, instruction)

    def finish(m: Machine, threads: Array) -> None:
        cta, votes = m.cta_of[threads], pred(m, threads)
        yes = np.bincount(cta, votes, m.num_ctas)[cta]
        total = np.bincount(cta, minlength=m.num_ctas)[cta]
        counts = {"popc": yes.astype(np.uint32), "and": yes == total, "or": yes > 0}
        write(m, threads, counts[next(iter(mods))])

    def step(m: Machine, threads: Threads) -> list[tuple[int, Array]] | None:
        m.on_release[pc] = finish
        return wait(m, threads)

    return step


_BINDERS: dict[str, Callable[[Instruction, int], Step]] = {
    "ret": _leave,
    "exit": _leave,
    "trap": memory_ops.trap,
    "ld": memory_ops.load,
    "ldu": memory_ops.load,
    "st": memory_ops.store,
    "atom": memory_ops.atomic,
    "red": memory_ops.atomic,
    "cp": memory_ops.async_copy,
    "cvta": memory_ops.to_space,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": warp.shuffle,
    "vote": warp.vote,
    "redux": warp.reduce,
    "ldmatrix": warp.load_matrix,
    "activemask": warp.active_mask,
    "createpolicy": _policy,
    "membar": _nothing,
    "fence": _nothing,
    "nanosleep": _nothing,
    "prefetch": _nothing,
    "griddepcontrol": _nothing,
}
