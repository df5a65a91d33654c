"""Held-out perplexity of plans: what each part of `simdiff` brings, and greedy search beside it.

    python benchmarks/plan_quality.py demo --output benchmarks/results/plan-quality-2-cores.csv

Every row is one plan: number of layers removed, method, layers, held-out perplexity, seconds to
plan after the calibration pass. Greedy search removes one layer at a time, each time the one
whose removal leaves the lowest perplexity on calibration windows (SLEB, arXiv 2402.09025);
`--greedy 0` leaves it out, which saves most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.block_costs import block_costs, decisive_layers
from simdiff.block_selection import best_contiguous_block, optimal_blocks
from simdiff.calibration import token_windows
from simdiff.criteria import importance
from simdiff.errors import SimdiffError
from simdiff.evaluation import perplexity
from simdiff.exchange import exchange_search, losses_of_cuts
from simdiff.models import load_model
from simdiff.planning import make_plan
from simdiff.progress import console
from simdiff.scores import LayerScores, score
from simdiff.shortlist import shortlist
from simdiff.surgery import removed_layers

Plan = tuple[int, ...]


def nll(model: PreTrainedModel, windows: Tensor, removed: Plan) -> float:
    """Mean negative log-likelihood without some layers."""
    with removed_layers(model, removed) if removed else contextlib.nullcontext():
        return perplexity(model, windows).nll


def greedy(model: PreTrainedModel, windows: Tensor, count: int) -> Iterator[tuple[Plan, float]]:
    """One layer after the other, with the seconds since the start."""
    start, removed = time.perf_counter(), ()
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    for _ in range(count):
        candidates = [(*removed, layer) for layer in range(num_layers) if layer not in removed]
        losses = {candidate: nll(model, windows, candidate) for candidate in candidates}
        removed = min(losses, key=losses.__getitem__)
        yield removed, time.perf_counter() - start


def methods(
    model: PreTrainedModel, scores: LayerScores, windows: Tensor
) -> dict[str, Callable[[int], Plan]]:
    """From a number of layers to a plan; the names say what is left out or put in place."""

    def lowest(name: str, alpha: float = 0.5) -> Callable[[int], Plan]:
        return lambda count: tuple(importance(scores, name, alpha).ranking()[:count])

    def blocks(name: str) -> Callable[[int], Plan]:
        return lambda count: optimal_blocks(block_costs(scores, name), count)

    def default(**options: object) -> Callable[[int], Plan]:
        return lambda count: make_plan(scores, count, **options).removed  # type: ignore[arg-type]

    losses = losses_of_cuts(model, windows)

    def shortlisted(count: int) -> Plan:
        plans = shortlist(scores, count, decisive_layers(scores))
        return exchange_search(losses, plans, block_costs(scores), max_reads=0)[0].removed

    return {
        "simdiff": default(model=model, windows=windows),
        "simdiff, no exchanges": shortlisted,
        "simdiff, no evaluations": default(),
        "simdiff, decisive layers free": default(keep_decisive=False),
        "simdiff, lowest": lowest("simdiff"),
        "cosine distance, blocks": blocks("cosine-distance"),
        "norm change, blocks": blocks("norm-change"),
        "simdiff, contiguous": lambda n: best_contiguous_block(block_costs(scores), n),
        "block influence": lowest("block-influence"),
        "SimDiff, MASD, alpha 0.5": lowest("simdiff-masd"),
    }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--layers", type=int, nargs="+", default=[*range(2, 13)])
    parser.add_argument("--windows", type=int, default=16, help="that calibrate")
    parser.add_argument("--evaluation-windows", type=int, default=4, help="of those, to choose")
    parser.add_argument("--held-out-windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--greedy", type=int, default=4, help="windows of the search; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    console.quiet = True
    model, tokenizer = load_model(options.model, dtype=options.dtype)

    def text(part: str, count: int) -> Tensor:
        return token_windows(
            options.text, tokenizer, part=part, num_windows=count,
            window_length=options.window_length, seed=options.seed,
        ).tokens  # fmt: skip

    calibration = text("calibration", options.windows)
    held_out = text("held-out", options.held_out_windows)
    start = time.perf_counter()
    scores = score(model, list(calibration.split(8)), progress=False)
    pass_seconds = time.perf_counter() - start
    known: dict[Plan, float] = {}
    rows: list[dict[str, object]] = []

    def add(count: int, method: str, plan: Plan, seconds: float) -> None:
        plan = tuple(sorted(plan))
        if plan not in known:
            known[plan] = math.exp(nll(model, held_out, plan))
        layers = " ".join(map(str, plan))
        rows.append({"removed": count, "method": method, "layers": layers,
                     "perplexity": f"{known[plan]:.3f}", "seconds": f"{seconds:.2f}"})  # fmt: skip
        print(f"{count:3} {method:32} {known[plan]:10.2f} {seconds:8.2f} s  {layers}", flush=True)

    add(0, "dense, and the calibration pass", (), pass_seconds)
    chosen = methods(model, scores, calibration[: options.evaluation_windows])
    for count in options.layers:
        for name, method in chosen.items():
            start = time.perf_counter()
            try:
                plan = method(count)
            except SimdiffError as error:
                print(f"{count:3} {name:32} {error}")
                continue
            add(count, name, plan, time.perf_counter() - start)
    if options.greedy:
        search = greedy(model, calibration[: options.greedy], max(options.layers))
        for plan, seconds in search:
            if len(plan) in options.layers:
                add(len(plan), "greedy perplexity search", plan, seconds)
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    with open(options.output, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
