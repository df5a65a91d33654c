"""What streaming costs a model that would fit: a pass of scores, streamed and plain, by turns.

    python benchmarks/streaming.py --dtype float32 --repeats 5 --output streaming.json

Files are warm. CPU seconds count all threads, also those that read weights and write states; they
tell on a busy machine what the wall clock does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from simdiff.data.text import TokenWindows, token_windows
from simdiff.io.machine import describe_machine
from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions
from simdiff.models.sweep import remove_states
from simdiff.scoring.calibration_pass import score


def timed(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int
) -> tuple[float, float, dict[str, Any]]:
    """Wall and CPU seconds of a pass, and its scores without the time."""
    wall, cpu = time.perf_counter(), time.process_time()
    scores = score(model, windows.batches(batch_size), progress=False).to_dict()
    remove_states(model)
    del scores["created"]
    return time.perf_counter() - wall, time.process_time() - cpu, scores


def main() -> None:
    """Measure, and print or write a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "streamed": []}
    with tempfile.TemporaryDirectory() as folder:
        options = StreamOptions(folder=Path(folder) / "states", always=True)
        models = {
            way: load_model(arguments.model, dtype=arguments.dtype, device="cpu", stream=stream)
            for way, stream in (("plain", None), ("streamed", options))
        }
        windows = token_windows(
            arguments.text,
            models["plain"][1],
            part="calibration",
            num_windows=arguments.windows,
            window_length=arguments.window_length,
        )
        for repeat in range(arguments.repeats + 1):  # the first is not counted
            seen = {}
            for way, (model, _) in models.items():
                wall, cpu, seen[way] = timed(model, windows, arguments.batch_size)
                found[way] += [(wall, cpu)] if repeat else []
            if seen["plain"] != seen["streamed"]:
                raise SystemExit("the scores differ: nothing is reported")
    ratios = [
        [streamed[kind] / plain[kind] for plain, streamed in zip(*found.values(), strict=True)]
        for kind in (0, 1)
    ]
    content = {
        "dtype": arguments.dtype,
        "windows": [arguments.windows, arguments.window_length],
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "seconds": found,
        "wall_ratio": {"median": statistics.median(ratios[0]), "all": ratios[0]},
        "cpu_ratio": {"median": statistics.median(ratios[1]), "all": ratios[1]},
    }
    text = json.dumps(content, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
