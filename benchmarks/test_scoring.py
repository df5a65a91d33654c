"""One update of running scores: GB/s, share of the memory's limit, ratio to PyTorch and peers.

All subjects of a case run interleaved on the same buffers, which no cache holds; the times and the
ratios in `extra_info`, with their intervals, come from there. pytest-benchmark then times our
update alone, on the same buffers. Every token that our update is timed on is checked before, and
all of one pair for the others. On a GPU there are few cases, of which two compile for PyTorch;
`make gpu-check` measures the rest.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import ratios
import subjects
import timing
import torch

from simdiff_kernels.backends import usable_backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_GPU = torch.cuda.is_available()
BACKENDS = [name for name in usable_backends("cuda" if ON_GPU else "cpu") if name != "reference"]
HIDDEN_SIZES = (576, 2048, 4096, 8192)
LARGE_BYTES = 256 << 20  # of one pair: no cache holds it
FEW_TOKENS = (1, 16)
# In a row, as layers follow each other: one call alone finds its code in no cache.
CALLS_OF_A_TURN = 20
LARGE_CASES = list(itertools.product(BACKENDS, HIDDEN_SIZES, DTYPES))
SMALL_CASES = list(itertools.product(BACKENDS, FEW_TOKENS, (576, 4096), DTYPES))
# A minute for each form and shape that PyTorch compiles as thoroughly as it can.
COMPILED_CASES = LARGE_CASES + SMALL_CASES
if ON_GPU:
    shapes = ((4096, "bfloat16"), (576, "bfloat16"), (4096, "float32"), (8192, "bfloat16"))
    LARGE_CASES = [(backend, *shape) for backend in BACKENDS for shape in shapes]
    SMALL_CASES = [
        (backend, tokens, 4096, "bfloat16") for backend in BACKENDS for tokens in FEW_TOKENS
    ]
    COMPILED_CASES = [(BACKENDS[0], *shape) for shape in shapes[:2]] if BACKENDS else []


def tokens_of(bytes_of_pair: int, hidden_size: int, dtype: torch.dtype) -> int:
    return bytes_of_pair // (2 * hidden_size * dtype.itemsize)


def measure(
    benchmark: Any,
    backend: str,
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    rounds: int,
    compile_too: bool,
    calls: int = 1,
) -> None:
    """Check, compare, then let pytest-benchmark time our update."""

    def make(seed: int) -> timing.Pair:
        return subjects.states(num_tokens, hidden_size, dtype, device, seed)

    pair_bytes = 2 * num_tokens * hidden_size * dtype.itemsize
    cold = pair_bytes >= LARGE_BYTES // 64
    pairs = timing.cold_pairs(make, pair_bytes, device) if cold else [make(0)]
    exact = [subjects.exact_means(*pair) for pair in pairs]
    for pair, wanted in zip(pairs, exact, strict=True):
        wrong = subjects.check(subjects.ours(backend), *pair, wanted)
        if wrong is not None:
            pytest.fail(f"not timed: {wrong}")
    ours = subjects.ours(backend)
    others = subjects.in_pytorch(device, compile_too)
    left_out = [text for other in others if (text := subjects.check(other, *pairs[0], exact[0]))]
    turn = itertools.cycle(pairs)

    def on_next_pair(run: Callable[..., object]) -> Callable[[], object]:
        return lambda: run(*next(turn))

    runs = {"limit": on_next_pair(timing.limit_of(pairs, device)), "ours": on_next_pair(ours.run)}
    runs |= {
        other.name: on_next_pair(other.run)
        for other in others
        if not any(text.startswith(f"{other.name}:") for text in left_out)
    }
    times = timing.interleaved(runs, device, repeats, calls)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    found, intervals = ratios.of_rounds(times, times["ours"])
    benchmark.group = f"update of {num_tokens} tokens of {hidden_size}, {str(dtype)[6:]}"
    benchmark.extra_info.update(
        backend=backend,
        tokens=num_tokens,
        hidden_size=hidden_size,
        dtype=str(dtype)[6:],
        bytes=pair_bytes,
        seconds=seconds["ours"],
        gb_per_second=pair_bytes / seconds["ours"] / 1e9,
        limit_gb_per_second=pair_bytes / seconds["limit"] / 1e9,
        fraction_of_limit=found.pop("limit"),
        times_faster={name: ratio for name, ratio in found.items() if name != "ours"},
        interval={
            "fraction_of_limit": intervals.pop("limit"),
            "times_faster": {name: ends for name, ends in intervals.items() if name != "ours"},
        },
        repeats=repeats,
        calls=calls,
        wrong=left_out,
        cache_bytes=timing.cache_bytes(device),
        bytes_before_reuse=(len(pairs) - 1) * pair_bytes,
    )

    timed = timing.finished(on_next_pair(ours.run), device)
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize(("backend", "hidden_size", "dtype"), LARGE_CASES)
def test_large_update(
    benchmark: Any, backend: str, hidden_size: int, dtype: str, device: str, quick: bool
) -> None:
    """A pair of 256 MB: what counts is the share of the memory's limit."""
    size = 1 << 20 if quick else LARGE_BYTES
    num_tokens = tokens_of(size, hidden_size, DTYPES[dtype])
    repeats, rounds = (1, 1) if quick else (9, 15)
    measure(
        benchmark,
        backend,
        num_tokens,
        hidden_size,
        DTYPES[dtype],
        device,
        repeats,
        rounds,
        compile_too=(backend, hidden_size, dtype) in COMPILED_CASES,
    )


@pytest.mark.parametrize(("backend", "num_tokens", "hidden_size", "dtype"), SMALL_CASES)
def test_small_update(
    benchmark: Any,
    backend: str,
    num_tokens: int,
    hidden_size: int,
    dtype: str,
    device: str,
    quick: bool,
) -> None:
    """A few tokens, as in decoding, in the cache: what counts is the time of a call."""
    repeats, rounds = (2, 2) if quick else (101, 2000)
    measure(
        benchmark,
        backend,
        num_tokens,
        hidden_size,
        DTYPES[dtype],
        device,
        repeats,
        rounds,
        compile_too=(backend, num_tokens, hidden_size, dtype) in COMPILED_CASES,
        calls=1 if device == "cuda" else CALLS_OF_A_TURN,
    )
