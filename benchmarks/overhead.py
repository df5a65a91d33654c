"""What scoring adds to the calibration forward: time and memory, on a real model and real text.

    python benchmarks/overhead.py --output benchmarks/results/overhead-NAME.json

The bare decoder forward and the scored one alternate in one process; medians are reported, with
the intervals of `ratios`, and memory is the peak of the resident set above that of the bare forward
over as many batches. On a shared machine the ratio is noisy; `share_in_update` is the time spent in
the scorer alone over that of the bare forward. The scores are compared with float64 before anything
is timed. `--quick` takes a batch of 2 x 16 tokens and one repeat: does it run?
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

import provenance
import ratios
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs
from simdiff.data.text import token_windows
from simdiff.io.machine import describe_machine
from simdiff.models.loading import DTYPES, load_model
from simdiff.models.structure import find_decoder_layers
from simdiff.scoring.calibration_pass import feed_forward
from simdiff.scoring.running_groups import RunningGroups
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


def scored(model: PreTrainedModel, batches: list[Tensor], backend: str | None) -> RunningScores:
    layers = find_decoder_layers(model)
    running = RunningScores(len(layers), backend=backend)
    feed_forward(model, layers.modules, running, model_inputs(batches, "overhead"))
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
    feed_forward(model, layers.modules, running, model_inputs(batches, "overhead"))
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

    for owner, name in (
        (running, "begin"),
        (running, "update"),
        (running, "end"),
        (running.blocks, "update"),
    ):
        if owner is not None:
            setattr(owner, name, timed(getattr(owner, name)))
    feed_forward(model, layers.modules, running, model_inputs(batches, "overhead"), running.blocks)
    return spent


@torch.no_grad()
def bare(model: PreTrainedModel, batches: list[Tensor]) -> None:
    for ids in batches:
        model.base_model(input_ids=ids, use_cache=False)


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


Size = tuple[int, int]  # windows of a batch, tokens of a window


def batches_of(tokenizer: object, count: int, size: Size) -> list[Tensor]:
    windows = token_windows("demo", tokenizer, num_windows=size[0] * count, window_length=size[1])
    return windows.batches(size[0])


def measure(name: str, dtype: str, repeats: int, num_batches: int, size: Size) -> dict[str, object]:
    model, tokenizer = load_model(name, dtype=dtype)
    batches = batches_of(tokenizer, num_batches, size)
    one = batches[:1]
    got, wanted = (scored(model, one, backend).finish() for backend in (None, "reference"))
    for metric in got:
        torch.testing.assert_close(got[metric].mean, wanted[metric].mean, rtol=1e-6, atol=0)
    turns = [
        (
            seconds(bare, model, one),
            seconds(scored, model, one, None),
            seconds_in_update(model, one),
        )
        for _ in range(repeats)
    ]
    of_bare, of_scored, within = zip(*turns, strict=True)
    found, intervals = ratios.of_rounds({"ratio": of_scored, "share_in_update": within}, of_bare)
    # The heap's own layout varies by tens of MB from pass to pass: compare the medians.
    peaks = [
        (
            peak_resident_bytes(bare, model, batches),
            peak_resident_bytes(scored, model, batches, None),
        )
        for _ in range(min(3, repeats))
    ]
    peak_bare, peak_scored = (statistics.median(values) for values in zip(*peaks, strict=True))
    return {
        "model": name,
        "dtype": dtype,
        "tokens": f"{size[0]} x {size[1]}",
        "bare_seconds": round(statistics.median(of_bare), 4),
        "scored_seconds": round(statistics.median(of_scored), 4),
        "ratio_of_pairs": [round(b / a, 4) for a, b, _ in turns],
        "seconds_in_update": round(statistics.median(within), 6),
        **found,
        "interval": intervals,
        "memory_above_bare_mb": round((peak_scored - peak_bare) / 1e6, 1),
        "memory_above_bare_mb_of_pairs": [round((b - a) / 1e6, 1) for a, b in peaks],
        "batches_for_memory": num_batches,
        "machine": describe_machine(),
        "torch": torch.__version__,
    }


def measure_pass(name: str, dtype: str, repeats: int, size: Size) -> dict[str, object]:
    """The whole pass: layers and groups of sequences, and with all blocks of layers too."""
    model, tokenizer = load_model(name, dtype=dtype)
    one = batches_of(tokenizer, 1, size)
    turns = [
        (
            seconds(bare, model, one),
            seconds_in_pass(model, one, False),
            seconds_in_pass(model, one, True),
        )
        for _ in range(repeats)
    ]
    forward, layers, blocks = zip(*turns, strict=True)
    spent = {"layers": layers, "with blocks": blocks}
    share_of_bare, intervals = ratios.of_rounds(spent, forward)
    return {
        "model": name,
        "dtype": dtype,
        "tokens": f"{size[0]} x {size[1]}",
        "bare_seconds": round(statistics.median(forward), 4),
        "seconds_in_pass": {part: round(statistics.median(s), 6) for part, s in spent.items()},
        "share_of_bare": share_of_bare,
        "interval": {"share_of_bare": intervals},
        "turns": [[round(value, 4) for value in turn] for turn in turns],
        "machine": describe_machine(),
        "torch": torch.__version__,
    }


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
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    repeats, size = (1, (2, 16)) if arguments.quick else (arguments.repeats, (8, 512))
    results = []
    for dtype in arguments.dtypes:
        if arguments.whole_pass:
            found = measure_pass(arguments.model, dtype, repeats, size)
        else:
            found = measure(arguments.model, dtype, repeats, arguments.batches, size)
        results.append(found)
        print(json.dumps(results[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        provenance.keep([arguments.output], ["cpu scorers", "calibration pass"])


if __name__ == "__main__":
    main()
