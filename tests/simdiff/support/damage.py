"""Damage of files for their readers: mutations of a valid file, drawn by hypothesis.

JSON is damaged by its structure (a value of every wrong kind at any place, names twice or gone,
numbers without measure, nesting without end) and all files byte by byte.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MINUTE = "SIMDIFF_FUZZ_SECONDS"
"""The environment variable that gives each reader so many seconds, with other damage every time."""

SECONDS_OF_READER = 5
"""Of the processor, for one small file: more is a loop that damage has made."""

MEMORY_OF_READER = 1 << 30
"""Bytes of address space, for one small file: more is a number of the file taken for a size."""


class Raw(NamedTuple):
    """JSON as it is written."""

    text: str


class Pairs(NamedTuple):
    """A JSON object whose names may come twice."""

    items: list[tuple[str, Any]]


ODD: tuple[Any, ...] = (
    *(None, True, False, "", "0", "../x", "x" * 300, "\x00", [], {}, [[]], {"": None}, [0, 0]),
    *(-1, 0, 1, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**12, 10**40, 0.5, 1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf")),
    *(Raw("1" + "0" * 400), Raw("9" * 5000), Raw("-0"), Raw("1e999"), Raw('"\\ud800"')),
    *(Raw("[" * 100_000), Raw('{"a":' * 50_000), Raw("[" * 900 + "]" * 900), Raw(""), Raw("tru")),
)
"""What stands in the place of a value."""

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)


def text_of(value: Any) -> str:
    """JSON of a value that may hold `Raw` and `Pairs`."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{text_of(v)}" for k, v in value.items) + "}"
    if isinstance(value, dict):
        return text_of(Pairs(list(value.items())))
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(text_of, value)) + "]"
    return json.dumps(value)


def _place(draw: st.DrawFn, content: Any) -> tuple[Any, Any]:
    """A container somewhere in the content, not empty, and a key of it."""
    while True:
        keys = sorted(content) if isinstance(content, dict) else range(len(content))
        key = draw(st.sampled_from(keys))
        inner = content[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
            return content, key
        content = inner


@st.composite
def damaged_json(draw: st.DrawFn, valid: dict[str, Any]) -> str:
    """The text of a JSON object with one to three mutations."""
    content = copy.deepcopy(valid)

    def odd(*more: Any) -> Any:
        return copy.deepcopy(draw(st.sampled_from((*ODD, *more))))

    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        container, key = _place(draw, content)
        action = draw(st.sampled_from(("odd", "odd", "odd", "gone", "twice", "more", "moved")))
        if action == "odd":
            container[key] = odd()
        elif action == "gone":
            del container[key]
        elif action == "more" and isinstance(container, list):
            container.insert(key, odd(container[key]))
        elif action == "moved":
            other, there = _place(draw, content)
            container[key] = copy.deepcopy(other[there])
        elif isinstance(container, dict):
            container[key] = _Twice((container[key], odd(container[key])))
    return text_of(_with_pairs(content))


class _Twice(tuple):
    """Two values of one name."""


def _with_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        items: list[tuple[str, Any]] = []
        for name, inner in value.items():
            both = inner if isinstance(inner, _Twice) else (inner,)
            items += [(name, _with_pairs(one)) for one in both]
        return Pairs(items)
    if isinstance(value, list):
        return [_with_pairs(inner) for inner in value]
    return value[1] if isinstance(value, _Twice) else value


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes, head: int = 64) -> bytes:
    """Bytes with up to four mutations, half of them in the first `head` bytes."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = min(head, len(content)) if draw(st.booleans()) else len(content)
        at = draw(st.integers(0, max(end - 1, 0)))
        action = draw(st.sampled_from(("flip", "number", "cut", "gone", "again", "new", "zeros")))
        size = draw(st.sampled_from((1, 2, 4, 8, 24)))
        if action == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "number":
            value = draw(st.sampled_from(EXTREMES))
            content[at : at + 8] = struct.pack("<Q", value)[: min(size, 8)] + bytes(
                content[at + min(size, 8) : at + 8]
            )
        elif action == "cut":
            del content[at:]
        elif action == "gone":
            del content[at : at + size]
        elif action == "again":
            content[at:at] = content[at : at + size]
        elif action == "new":
            content[at:at] = draw(st.binary(min_size=1, max_size=size))
        else:
            content[at : at + size] = bytes(len(content[at : at + size]))
    return bytes(content)


class TooLongError(BaseException):
    """A reader has used all of its time; no reader may catch it."""


@contextmanager
def limits() -> Iterator[None]:
    """Bound what a reader may use; Python raises MemoryError and TooLongError beyond."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"the reader took more than {SECONDS_OF_READER} s of the processor")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    usual = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_OF_READER, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_OF_READER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, usual)


def fuzz(damage: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    """Check damage of one kind: always the same examples, or other ones for a given time."""
    seconds = float(os.environ.get(MINUTE, "0"))
    start, round_ = time.monotonic(), 0
    while True:

        @seed(round_ if not seconds else time.time_ns())
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(damage)
        def run(case: Any) -> None:
            with limits():
                check(case)

        run()
        round_ += 1
        if time.monotonic() - start >= seconds:
            return
