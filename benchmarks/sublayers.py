"""Attention and MLP sub-layers: what scoring them adds to a forward, and what removing them costs.

`python benchmarks/sublayers.py demo --output FILE` times the bare decoder forward, the one that
scores layers and the one that scores sub-layers too, in turn, and then reads held-out text with
plans of both kinds applied in memory. `share_in_update` is the time spent in the scorer of
sub-layers alone over that of the bare forward: less noisy than the difference of two forwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import provenance
import torch
from overhead import bare, peak_resident_bytes
from timing import interleaved
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.io.machine import describe_machine
from simdiff.io.progress import silent
from simdiff.models.loading import load_model
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.hooks import SublayerHooks
from simdiff.sublayers.plan import plan_sublayers
from simdiff.sublayers.scores import score_with_sublayers
from simdiff.sublayers.structure import find_sublayers
from simdiff.sublayers.surgery import sublayers_removed

PLANS = (("attention", 7), ("attention", 14), ("mlp", 7), ("sublayer", 14))
CRITERIA = ("simdiff", "block-influence")
SEARCHED = "simdiff, effort normal"


def seconds_in_update(model: PreTrainedModel, batches: list[Tensor]) -> float:
    """Spent in `SublayerHooks.update` over a whole pass."""
    plain, spent = SublayerHooks.update, 0.0

    def timed(hooks: SublayerHooks, *arguments) -> None:
        nonlocal spent
        start = time.perf_counter()
        plain(hooks, *arguments)
        spent += time.perf_counter() - start

    SublayerHooks.update = timed
    try:
        score_with_sublayers(model, batches, blocks=False, progress=False)
    finally:
        SublayerHooks.update = plain
    return spent


def cost(model: PreTrainedModel, batches: list[Tensor], repeats: int) -> dict[str, float]:
    runs = {
        "bare": lambda: bare(model, batches),
        "layers": lambda: score(model, batches, blocks=False, progress=False),
        "sublayers": lambda: score_with_sublayers(model, batches, blocks=False, progress=False),
    }
    seconds = interleaved(runs, "cpu", repeats)
    shares = [seconds_in_update(model, batches) for _ in range(3)]
    start = time.perf_counter()
    find_sublayers(model)
    finding = time.perf_counter() - start
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_resident_bytes(run) for name, run in runs.items()}
    return {
        **{f"{name}_seconds": value for name, value in middle.items()},
        "ratio": middle["sublayers"] / middle["bare"],
        "share_in_update": statistics.median(shares) / middle["bare"],
        "finding_seconds": finding,
        "peak_over_bare_bytes": peaks["sublayers"] - peaks["bare"],
    }


def quality(
    model: PreTrainedModel, scores: LayerScores, held_out: Tensor, calibration: Tensor
) -> list[dict]:
    rows = [{"removed": 0, "unit": "", "perplexity": perplexity(model, held_out).perplexity}]
    for criterion in (*CRITERIA, SEARCHED):
        searched = {"model": model, "windows": calibration} if criterion == SEARCHED else {}
        for unit, count in PLANS:
            name = CRITERIA[0] if searched else criterion
            plan = plan_sublayers(scores, unit, count, criterion=name, **searched)
            with sublayers_removed(model, plan.removed):
                found = perplexity(model, held_out).perplexity
            rows.append(
                {
                    "removed": count,
                    "unit": unit,
                    "criterion": criterion,
                    "sublayers": [str(name) for name in plan.removed],
                    "perplexity": found,
                    "share_of_greedy": plan.search.get("share_of_greedy"),
                }
            )
            print(f"{count:3} {unit:10} {criterion:16} {found:10.2f}", flush=True)
    return rows


@silent()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--held-out-windows", type=int, default=8, help="0: cost alone")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="0: quality alone")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)

    def text(part: str, count: int) -> Tensor:
        return token_windows(
            "demo", tokenizer, part=part, num_windows=count, window_length=options.window_length
        ).tokens

    calibration = list(text("calibration", options.windows).split(options.batch_size))
    with torch.inference_mode():
        measured = cost(model, calibration[:1], options.repeats) if options.repeats else {}
        print(json.dumps(measured, indent=1), flush=True)
        rows = []
        if options.held_out_windows:
            scores = score_with_sublayers(model, calibration, progress=False)
            held_out = text("held-out", options.held_out_windows)
            rows = quality(model, scores, held_out, torch.cat(calibration))
    content = {
        "machine": describe_machine(),
        "model": options.model,
        "dtype": options.dtype,
        "windows": options.windows,
        "held_out_windows": options.held_out_windows,
        "window_length": options.window_length,
        "batch_size": options.batch_size,
        "cost": measured,
        "quality": rows,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    provenance.keep([options.output], ["sub-layers", "cpu scorers", "calibration pass", "effort"])


if __name__ == "__main__":
    main()
