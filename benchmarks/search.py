"""What reusing states saves in a search: one step of greedy search on the demo model, both ways.

The plain way takes the layers out and runs the rest from the start; the search passes layers by and
runs only those after the first change. Both must give the same losses to the last bit before
anything is reported. The ways alternate by candidate, so that other guests of the machine slow down
both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import provenance
import torch

from simdiff.data.text import token_windows
from simdiff.evaluation.losses import window_losses
from simdiff.io.machine import describe_machine
from simdiff.models.loading import load_model
from simdiff.models.structure import find_decoder_layers
from simdiff.planning.bypass import BypassEvaluator
from simdiff.surgery.layers import layers_removed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    windows = token_windows(
        "demo", tokenizer, num_windows=arguments.windows, window_length=arguments.window_length
    ).tokens
    depth = len(find_decoder_layers(model))
    evaluator = BypassEvaluator(model, windows)
    start = time.perf_counter()
    evaluator.losses(())  # keeps the states: part of what the step costs
    plain, cached = 0.0, time.perf_counter() - start
    for layer in range(depth):
        start = time.perf_counter()
        found = evaluator.losses((layer,))
        middle = time.perf_counter()
        with layers_removed(model, (layer,)):
            wanted = window_losses(model, windows, description=None)
        plain += time.perf_counter() - middle
        cached += middle - start
        if found != wanted:
            raise SystemExit(f"layer {layer}: {found} must equal {wanted}")
    result = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "windows": list(windows.shape),
        "candidates": depth,
        "plain_seconds": plain,
        "reusing_seconds": cached,
        "ratio": plain / cached,
    }
    print(json.dumps(result, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        provenance.keep([arguments.output], ["planning"])


if __name__ == "__main__":
    main()
