"""Reads PTX text into kernels: registers, variables, parameters, labels and instructions."""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from .faults import PtxSyntaxError, UnsupportedInstruction

REGISTER_BYTES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "pred": 0},
}
_FLOATS = {"f16": "<e", "f32": "<f", "f64": "<d"}
_NUMBER = re.compile(
    r"[-+]?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0x[0-9a-fA-F]+|\d[\d.eE+-]*)U?"
)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)\s*(?P<array>\[\s*(?P<count>\d*)\s*\])?\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)


@dataclass(frozen=True)
class Reg:
    """A declared register; `nbytes` is 0 for a predicate."""

    name: str
    nbytes: int
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """An immediate: an integer, or the exact value and width of a floating-point constant."""

    value: int | float


@dataclass(frozen=True)
class Special:
    """A special register such as `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable plus an offset, or a label."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """The operand in brackets: a base and a constant offset in bytes."""

    base: Reg | Symbol | Imm
    offset: int


@dataclass(frozen=True)
class Vector:
    """The operand in braces; None stands for the sink `_`."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction with its guard predicate."""

    line: int
    text: str
    opcode: str
    mods: tuple[str, ...]
    operands: tuple[Any, ...]
    guard: Reg | None = None

    def unsupported(self, reason: str = "") -> UnsupportedInstruction:
        """Make the exception that names this instruction."""
        return UnsupportedInstruction(self.text, self.line, reason)


@dataclass(frozen=True)
class Variable:
    """A variable in shared, local, global, constant or parameter space."""

    name: str
    space: str
    type: str
    nbytes: int
    align: int
    data: bytes | None = None
    dynamic: bool = False


@dataclass
class Kernel:
    """One `.entry`."""

    name: str
    params: list[Variable]
    cta_limit: dict[str, int]
    registers: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


@dataclass
class Module:
    """All kernels of one PTX text and the variables that they share."""

    kernels: dict[str, Kernel]
    variables: list[Variable]


def parse(text: str) -> Module:
    """Parse PTX text as Triton and nvcc write it."""
    text = _strip(text)
    lines = [match.end() for match in re.finditer("\n", text)]
    kernels: dict[str, Kernel] = {}
    rest = text
    head = re.compile(r"\.(entry|func)\b([^{};]*)(\{|;)")
    for match in head.finditer(text):
        end = match.end()
        if match[3] == "{":
            end = _closing(text, match.end() - 1)
        if match[1] == "entry" and match[3] == "{":
            kernel = _kernel_head(match[2])
            _Body(kernel, text[: end - 1], match.end(), lines).parse()
            kernels[kernel.name] = kernel
        blank = re.sub(r"[^\n]", " ", text[match.start() : end])
        rest = rest[: match.start()] + blank + rest[end:]
    variables = []
    for part in re.sub(r"\.(visible|extern|weak|common)\b", "", rest).split(";"):
        if part.strip():
            variables.append(_variable(part.strip(), extern=True))
    return Module(kernels, variables)


def _strip(text: str) -> str:
    """Blank out comments, debug sections and directives without meaning, keeping line numbers."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"^[ \t]*\.section[^{]*\{[^}]*\}", blank, text, flags=re.S | re.M)
    line_directives = r"^[ \t]*\.(loc|file|version|target|address_size)\b[^\n]*"
    text = re.sub(line_directives, blank, text, flags=re.M)
    text = re.sub(r"\.pragma\s+\"[^\"]*\"\s*;", blank, text)
    return re.sub(r"[ \t]+", " ", text)


def _closing(text: str, start: int) -> int:
    """Position after the brace that closes the one at `start`."""
    depth = 0
    for match in re.compile("[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise PtxSyntaxError("unbalanced braces")


def _kernel_head(text: str) -> Kernel:
    match = re.match(r"\s*([\w$]+)\s*(?:\((.*?)\))?(.*)$", text, re.S)
    if match is None:
        raise PtxSyntaxError(f"not an entry: {text!r}")
    params = [_variable(part.strip()) for part in (match[2] or "").split(",") if part.strip()]
    limits = {}
    for name, value in re.findall(r"\.(reqntid|maxntid)\s+([\d,\s]+)", match[3]):
        threads = 1
        for number in value.split(","):
            threads *= int(number)
        limits[name] = threads
    return Kernel(match[1], params, limits)


def _variable(text: str, extern: bool = False) -> Variable:
    match = _VARIABLE.match(text)
    if match is None or match["type"] not in REGISTER_BYTES:
        raise PtxSyntaxError(f"cannot read the declaration {text!r}")
    width = REGISTER_BYTES[match["type"]]
    count = int(match["count"] or 0) if match["array"] else 1
    data = None
    if match["init"]:
        numbers = [parse_number(part) for part in match["init"].strip("{} \n\t").split(",")]
        values = [number for number in numbers if number is not None]
        code = _FLOATS.get(match["type"])
        if len(values) < len(numbers) or (code is None and match["type"][0] == "f"):
            raise PtxSyntaxError(f"cannot read the initialiser of {text!r}")
        modulus = 1 << 8 * width
        chunks = [
            struct.pack(code, value) if code else int(value % modulus).to_bytes(width, "little")
            for value in values
        ]
        data = b"".join(chunks).ljust(count * width, b"\0")
        count = len(data) // width
    align = max(int(match["align"] or 1), width)
    dynamic = extern and match["array"] is not None and count == 0
    return Variable(
        match["name"], match["space"], match["type"], count * width, align, data, dynamic
    )


def parse_number(text: str) -> int | float | None:
    """The value of an immediate, or None if the text is not one."""
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, digits = (-1 if text[0] == "-" else 1), match[1]
    if digits[:2] in ("0f", "0F"):
        return sign * struct.unpack(">f", bytes.fromhex(digits[2:]))[0]
    if digits[:2] in ("0d", "0D"):
        return sign * struct.unpack(">d", bytes.fromhex(digits[2:]))[0]
    if digits.isdigit() or digits.startswith("0x"):
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        return sign * int(digits, 8 if octal else 0)
    return sign * float(digits)


class _Body:
    """Parses the statements of one kernel body, with nested register scopes."""

    def __init__(self, kernel: Kernel, text: str, start: int, lines: list[int]) -> None:
        self.kernel, self.text, self.position, self.lines = kernel, text, start, lines
        self.scopes: list[dict[str, str]] = [{}]
        self.num_scopes = 0

    def parse(self) -> None:
        """Read every statement up to the end of the text."""
        space = re.compile(r"\s*")
        while True:
            self.position = space.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position >= len(self.text):
                return
            label = _LABEL.match(self.text, self.position)
            if self.text[self.position] in "{};":
                self._scope(self.text[self.position])
                self.position += 1
            elif label:
                self.kernel.labels[label[1]] = len(self.kernel.code)
                self.position = label.end()
            else:
                end = self.text.find(";", self.position)
                if end < 0:
                    raise PtxSyntaxError(f"no ';' after {self.text[self.position :][:60]!r}")
                statement = " ".join(self.text[self.position : end].split())
                self._statement(statement, bisect_right(self.lines, self.position) + 1)
                self.position = end + 1

    def _scope(self, brace: str) -> None:
        if brace == "{":
            self.scopes.append({})
            self.num_scopes += 1
        elif brace == "}":
            self.scopes.pop()

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith((".shared", ".local")):
            self.kernel.variables.append(_variable(text))
        elif text.startswith("."):
            raise UnsupportedInstruction(text, line, "directive")
        else:
            try:
                self.kernel.code.append(self._instruction(text, line))
            except PtxSyntaxError as error:
                raise UnsupportedInstruction(text, line, str(error)) from error

    def _declare(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        if match is None or match[1] not in REGISTER_BYTES:
            raise PtxSyntaxError(f"cannot read the declaration {text!r}")
        suffix = f"@{self.num_scopes}" if len(self.scopes) > 1 else ""
        for part in match[2].split(","):
            many = re.fullmatch(r"\s*(\S+?)<(\d+)>\s*", part)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [part.strip()]
            for name in names:
                self.scopes[-1][name] = name + suffix
                self.kernel.registers[name + suffix] = REGISTER_BYTES[match[1]]

    def _instruction(self, text: str, line: int) -> Instruction:
        match = re.match(r"(?:@(!?)\s*([\w%$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if match is None:
            raise PtxSyntaxError("cannot read it")
        guard = self._operand(("!" if match[1] else "") + match[2]) if match[2] else None
        opcode, *mods = match[3].split(".")
        operands = []
        for part in _split(match[4]):
            pair = part.split("|")
            operands.append(
                self._operand(part)
                if len(pair) == 1
                else Vector(tuple(self._operand(item) for item in pair))
            )
        return Instruction(line, text, opcode, tuple(mods), tuple(operands), guard)

    def _register(self, name: str) -> Reg | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return Reg(scope[name], self.kernel.registers[scope[name]])
        return None

    def _operand(self, text: str) -> Any:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("!"):
            register = self._register(text[1:].strip())
            if register is not None:
                return Reg(register.name, register.nbytes, negated=True)
        register = self._register(text)
        if register is not None:
            return register
        number = parse_number(text)
        if number is not None:
            return Imm(number)
        if text.startswith("%"):
            return Special(text)
        match = re.fullmatch(r"([\w$]+)\s*(?:\+\s*(-?\w+))?", text)
        if match is None:
            raise PtxSyntaxError(f"operand {text!r}")
        return Symbol(match[1], int(match[2] or "0", 0))

    def _address(self, text: str) -> Address:
        match = re.fullmatch(r"([\w$%]+)\s*(?:([+-])\s*(-?\w+))?", text)
        if match is None:
            raise PtxSyntaxError(f"address [{text}]")
        offset = int(match[3] or "0", 0) * (-1 if match[2] == "-" else 1)
        base = self._operand(match[1])
        if isinstance(base, Symbol):
            base, offset = Symbol(base.name), offset + base.offset
        return Address(base, offset)


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]
