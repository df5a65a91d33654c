"""What scoring adds to the calibration forward: time and memory, on a real model and real text.

`make bench` runs it on the demo model. The bare decoder forward and the scored one alternate in
one process; medians are reported, and memory is the peak of the resident set above that of the
bare forward over as many batches. On a shared machine the ratio is noisy; `share_in_update` is the
time spent in the scorer alone over that of the bare forward. The scores are compared with float64
before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.calibration import token_windows
from simdiff.machine import describe_machine
from simdiff.models import DTYPES, find_decoder_layers, load_model
from simdiff.running_groups import RunningGroups
from simdiff.scores import feed_forward
from simdiff_kernels import RunningScores


def peak_resident_bytes(function, *arguments) -> int:
    """Peak of the resident set while the function runs (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed must not hide anything
    Path("/proc/self/clear_refs").write_text("5")
    function(*arguments)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("VmHWM must be in /proc/self/status")


def as_inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def scored(model: PreTrainedModel, batches: list[Tensor], backend: str | None) -> RunningScores:
    layers = find_decoder_layers(model)
    running = RunningScores(len(layers), backend=backend)
    feed_forward(model, layers.modules, running, map(as_inputs, batches))
    return running


class TimedScores(RunningScores):
    """Adds up the seconds spent in `update`: less noisy than the difference of two forwards."""

    seconds = 0.0

    def update(self, *arguments) -> None:
        start = time.perf_counter()
        super().update(*arguments)
        self.seconds += time.perf_counter() - start


def seconds_in_update(model: PreTrainedModel, batches: list[Tensor]) -> float:
    layers = find_decoder_layers(model)
    running = TimedScores(len(layers))
    feed_forward(model, layers.modules, running, map(as_inputs, batches))
    return running.seconds


def seconds_in_pass(model: PreTrainedModel, batches: list[Tensor], blocks: bool) -> float:
    """Within all that the pass of `simdiff score` does beside the forward."""
    layers, spent = find_decoder_layers(model), 0.0
    running = RunningGroups(len(layers), sum(map(len, batches)), blocks=blocks)

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = function(*arguments)
            spent += time.perf_counter() - start
            return result

        return call

    for owner, name in ((running, "begin"), (running, "update"), (running, "end"),
                        (running.blocks, "update")):  # fmt: skip
        if owner is not None:
            setattr(owner, name, timed(getattr(owner, name)))
    feed_forward(model, layers.modules, running, map(as_inputs, batches), running.blocks)
    return spent


@torch.no_grad()
def bare(model: PreTrainedModel, batches: list[Tensor]) -> None:
    for ids in batches:
        model.base_model(input_ids=ids, use_cache=False)


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(name: str, dtype: str, repeats: int, num_batches: int) -> dict[str, object]:
    model, tokenizer = load_model(name, dtype=dtype)
    windows = token_windows("demo", tokenizer, num_windows=8 * num_batches, window_length=512)
    batches = windows.batches(8)
    one = batches[:1]
    got, wanted = (scored(model, one, backend).finish() for backend in (None, "reference"))
    for metric in got:
        torch.testing.assert_close(got[metric].mean, wanted[metric].mean, rtol=1e-6, atol=0)
    pairs = [(seconds(bare, model, one), seconds(scored, model, one, None)) for _ in range(repeats)]
    median_bare, median_scored = (statistics.median(times) for times in zip(*pairs, strict=True))
    inside = statistics.median(seconds_in_update(model, one) for _ in range(repeats))
    # The heap's own layout varies by tens of MB from pass to pass: compare the medians.
    peaks = [
        (
            peak_resident_bytes(bare, model, batches),
            peak_resident_bytes(scored, model, batches, None),
        )
        for _ in range(3)
    ]
    peak_bare, peak_scored = (statistics.median(values) for values in zip(*peaks, strict=True))
    return {
        "model": name,
        "dtype": dtype,
        "tokens": "8 x 512",
        "bare_seconds": round(median_bare, 4),
        "scored_seconds": round(median_scored, 4),
        "ratio": round(median_scored / median_bare, 4),
        "ratio_of_pairs": [round(b / a, 4) for a, b in pairs],
        "seconds_in_update": round(inside, 4),
        "share_in_update": round(inside / median_bare, 4),
        "memory_above_bare_mb": round((peak_scored - peak_bare) / 1e6, 1),
        "memory_above_bare_mb_of_pairs": [round((b - a) / 1e6, 1) for a, b in peaks],
        "batches_for_memory": num_batches,
        "machine": describe_machine(),
        "torch": torch.__version__,
    }


def measure_pass(name: str, dtype: str, repeats: int) -> dict[str, object]:
    """The whole pass: layers and groups of sequences, and with all blocks of layers too."""
    model, tokenizer = load_model(name, dtype=dtype)
    one = token_windows("demo", tokenizer, num_windows=8, window_length=512).batches(8)
    turns = [
        (seconds(bare, model, one), seconds_in_pass(model, one, False),
         seconds_in_pass(model, one, True))
        for _ in range(repeats)
    ]  # fmt: skip
    forward, layers, blocks = (statistics.median(times) for times in zip(*turns, strict=True))
    return {
        "model": name,
        "dtype": dtype,
        "tokens": "8 x 512",
        "bare_seconds": round(forward, 4),
        "seconds_in_pass": {"layers": round(layers, 4), "with blocks": round(blocks, 4)},
        "share_of_bare": {
            "layers": round(layers / forward, 4), "with blocks": round(blocks / forward, 4)
        },
        "turns": [[round(value, 4) for value in turn] for turn in turns],
        "machine": describe_machine(),
        "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--whole-pass",
        action="store_true",
        help="what the pass of `simdiff score` does, blocks and groups included",
    )
    parser.add_argument("--batches", type=int, default=2, help="for the comparison of memory")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    results = []
    for dtype in arguments.dtypes:
        if arguments.whole_pass:
            found = measure_pass(arguments.model, dtype, arguments.repeats)
        else:
            found = measure(arguments.model, dtype, arguments.repeats, arguments.batches)
        results.append(found)
        print(json.dumps(results[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
