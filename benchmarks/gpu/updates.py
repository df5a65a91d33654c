"""Reading pairs of hidden states: our operators beside the memory's limit, and beside PyTorch."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import subjects
import timing
import torch

from gpu.steps import Result, Settings, Step

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One shape; `wanted` is the share of the pure read that the sums of tokens must reach."""

    dtype: str
    tokens: int
    hidden_size: int
    wanted: float | None = None

    def __str__(self) -> str:
        return f"{self.dtype} {self.tokens} x {self.hidden_size}"


# The most important first.
CASES = (
    Case("bf16", 8192, 4096, 0.93),
    Case("bf16", 2048, 4096, 0.88),
    Case("bf16", 32768, 4096, 0.96),
    Case("bf16", 512, 4096, 0.82),
    Case("bf16", 131072, 4096, 0.98),
    Case("bf16", 8192, 576, 0.90),
    Case("bf16", 2048, 576, 0.90),
    Case("bf16", 32768, 576, 0.86),
    Case("bf16", 131072, 576, 0.92),
    Case("bf16", 8192, 2048, 0.90),
    Case("bf16", 8192, 8192, 0.95),
    Case("fp32", 8192, 4096, 0.96),
    Case("fp32", 8192, 576, 0.88),
    Case("bf16", 64, 4096),
    Case("bf16", 1, 4096),
    Case("fp16", 32768, 4096),
)
# Each is compiled twice, about half a minute.
PEER_CASES = (
    Case("bf16", 8192, 4096),
    Case("bf16", 32768, 4096),
    Case("fp32", 8192, 4096),
    Case("bf16", 32768, 576),
)
QUICK_CASES = (Case("bf16", 33, 64, 0.9), Case("fp32", 5, 40))


def steps(settings: Settings) -> list[Step]:
    """One for each shape."""
    return [
        Step("update", str(case), 0 if settings.quick else 8, partial(_measure, settings, case))
        for case in (QUICK_CASES if settings.quick else CASES)
    ]


def peer_steps(settings: Settings) -> list[Step]:
    """The same beside PyTorch, for a few shapes."""
    return [
        Step("peers", str(case), 0 if settings.quick else 45, partial(_compare, settings, case))
        for case in (QUICK_CASES[:1] if settings.quick else PEER_CASES)
    ]


def _pairs(settings: Settings, case: Case) -> tuple[list[timing.Pair], Result]:
    dtype, device = DTYPES[case.dtype], settings.device
    size = 2 * case.tokens * case.hidden_size * dtype.itemsize
    pairs = timing.cold_pairs(
        lambda seed: subjects.states(case.tokens, case.hidden_size, dtype, device, seed),
        1 << 28 if settings.quick else size,
        device,
    )
    shape = {"dtype": case.dtype, "tokens": case.tokens, "hidden_size": case.hidden_size}
    return pairs, shape | {"bytes": size}


def _ours(backend: str) -> dict[str, subjects.Subject | None]:
    return {"row_sums": subjects.row_sums(backend), "update": subjects.ours(backend)}


def _timed(
    subject: subjects.Subject, pairs: list[timing.Pair], settings: Settings
) -> dict[str, Any]:
    """Seconds of the device, or what is wrong with the result; what raises spoils no other's."""
    repeats = 2 if settings.quick else 7
    try:
        wrong = subjects.check(subject, *pairs[0])
        if wrong is not None:
            return {"wrong": wrong}
        return {"seconds": timing.device_seconds(subject.run, pairs, settings.device, repeats)}
    except Exception as error:
        traceback.print_exc()
        return {"wrong": f"{type(error).__name__}: {error}"[:500]}


def _measure(settings: Settings, case: Case, left: object) -> Iterator[Result]:
    """The read, a copy, and both operators on every backend; device and host apart."""
    pairs, result = _pairs(settings, case)
    how, read = timing.pure_read(pairs, settings.device)
    result |= {"read_seconds": read, "read_by": how, "wanted": case.wanted, "ours": {}}
    for backend in settings.backends:
        for name, subject in _ours(backend).items():
            if subject is None:
                continue
            found = _timed(subject, pairs, settings)
            if "seconds" in found:
                found["share"] = read / found["seconds"]
                found["host_seconds"] = timing.host_seconds(subject.run, pairs[0], settings.device)
            result["ours"].setdefault(name, {})[backend] = found
    result["copy_seconds"] = timing.copy_seconds(pairs, settings.device)  # writes over the pairs
    yield result


def _compare(settings: Settings, case: Case, left: object) -> Iterator[Result]:
    """The whole update beside what PyTorch makes of the same."""
    pairs, result = _pairs(settings, case)
    torch._dynamo.reset()
    ours = {f"update, {backend}": subjects.ours(backend) for backend in settings.backends}
    theirs = {subject.name: subject for subject in subjects.one_pass(settings.device)}
    yield result | {
        "subjects": {
            name: _timed(subject, pairs, settings) for name, subject in (ours | theirs).items()
        }
    }
