"""What each effort finds and costs, beside greedy search: layers, held-out losses, layers run.

    python benchmarks/effort.py MODEL --seeds 1 --greedy 4 --output RESULT.json

The protocol is that of `quality.py` (its texts, windows and cache). Cost is counted, not timed: the
layers and heads that a way runs on one window, its calibration pass included, and as a share of
greedy search on four windows (`simdiff.planning.cost`). `--without` leaves a part out:

- `exchanges`: the plan of the steps is final, but for the last choice;
- `lists`: a step reads every layer, not the few that earlier steps promise;
- `windows`: every plan reads one window.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import provenance
import quality
import texts
import torch
from transformers import PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.io.machine import describe_machine
from simdiff.io.progress import silent
from simdiff.models.loading import load_model
from simdiff.planning import names
from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.cost import Cost, prices_of
from simdiff.planning.make_plan import make_plan
from simdiff.scoring.calibration_pass import score

SHARES = (0.1, 0.25, 0.4)
WITHOUT = {
    "exchanges": {"exchanges": False},
    "lists": {"width": 1 << 20},
    "windows": {"windows": 1},
}


def rows(model: PreTrainedModel, windows: Any, scores: Any, options: Any, reads: Any) -> Iterator:
    """Every way at every number of layers."""
    prices = prices_of(model)
    counts = [max(1, round(share * scores.num_layers)) for share in options.shares]
    ways = [(effort, effort, {}) for effort in options.efforts]
    ways += [(f"normal without {part}", "normal", WITHOUT[part]) for part in options.without]
    known = dict(names.EFFORTS)
    for count in counts:
        greedy = prices.total(prices.greedy(count, 4))
        for way, effort, changed in ways:
            began = time.perf_counter()
            if changed:
                names.EFFORTS[effort] = replace(known[effort], **changed)
            plan = make_plan(
                scores, count, model=model, windows=windows, effort=effort, evaluation_windows=4
            )
            names.EFFORTS.update(known)
            search = plan.search or {"windows_read": sum(c["num_windows"] for c in plan.candidates)}
            cost = Cost(search.get("layers_run", 0), search.get("heads_run", 0))
            if effort == "quick":  # each read runs at most all kept layers
                cost = Cost(scores.num_layers - count, 1) * search["windows_read"]
            cost += Cost(scores.num_layers) * len(windows)
            share = search.get("share_of_greedy", prices.total(cost) / greedy)
            yield row(way, count, plan.removed, cost, share, began) | {"search": search}
        yield row("block influence", count, influence(scores, count), Cost(), 0, 0)
        for number in options.greedy:
            began = time.perf_counter()
            cost = prices.greedy(count, number)
            found = greedy_plan(reads, count, number, scores.num_layers)
            yield row(
                f"greedy, {number} windows", count, found, cost, prices.total(cost) / greedy, began
            )


def row(
    way: str, count: int, layers: Any, cost: Cost, share: float, began: float
) -> dict[str, Any]:
    """A way's plan and cost."""
    print(f"  {way}, {count}: {sorted(layers)}, {share:.2f} of greedy search", flush=True)
    return {
        "way": way,
        "removed": count,
        "layers": " ".join(map(str, sorted(layers))),
        "layers_run": cost.layers,
        "heads_run": cost.heads,
        "share_of_greedy": round(share, 4),
        "seconds": round(time.perf_counter() - began, 1) if began else 0.0,
    }


def influence(scores: Any, count: int) -> tuple[int, ...]:
    """The layers of lowest block influence."""
    return make_plan(scores, count, criterion="block-influence").removed


def greedy_plan(reads: quality.Reads, count: int, number: int, depth: int) -> tuple[int, ...]:
    """Greedy search by perplexity on so many windows."""
    removed: tuple[int, ...] = ()
    for _ in range(count):
        reads.rebase(removed, number)
        tried = [(*removed, k) for k in range(depth) if k not in removed]
        removed = min(tried, key=lambda plan: reads.mean(plan, number))
        reads.save()
    return removed


def of_seed(model: PreTrainedModel, tokenizer: Any, seed: int, options: Any) -> dict[str, Any]:
    """All ways on one division of the text."""
    divided = texts.halves(options.text, options.pool, seed)

    def windows(documents: list[str], count: int, length: int) -> torch.Tensor:
        return token_windows(
            documents, tokenizer, part="all", num_windows=count, window_length=length
        ).tokens

    calibration = windows(divided.calibration, options.windows, options.window_length)
    held_out = windows(divided.held_out, options.held_out_windows, options.held_out_length)
    scores = score(model, list(calibration.split(8)), progress=False)
    name = f"{Path(options.model).name}-{Path(options.text).stem}-{options.pool}-{seed}.pt"
    reads = quality.Reads(model, calibration, options.cache and options.cache / name)
    found = list(rows(model, calibration, scores, options, reads))
    evaluator = BypassEvaluator(model, held_out)
    losses = {}
    for layers in ["", *sorted({entry["layers"] for entry in found})]:
        plan = tuple(map(int, layers.split()))
        key = ("held-out", plan, len(held_out))
        if key not in reads.known:
            measured = torch.tensor(evaluator.losses(plan), dtype=torch.float64)
            reads.known[key] = measured, 0.0
            reads.save()
        losses[layers or "dense"] = [round(v, 5) for v in reads.known[key][0].tolist()]
    return {
        "seed": seed,
        "documents_sha256": divided.sha256,
        "licence": divided.licence,
        "rows": found,
        "held_out_losses": losses,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--text", default="wikipedia", help="wikipedia or python")
    parser.add_argument("--pool", choices=texts.POOLS, default="reporting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--efforts", nargs="*", choices=[*names.EFFORTS], default=[*names.EFFORTS])
    parser.add_argument("--without", nargs="*", choices=[*WITHOUT], default=[])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--greedy", type=int, nargs="*", default=[4], help="windows of each")
    parser.add_argument("--windows", type=int, default=16, help="that calibrate")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--held-out-windows", type=int, default=12)
    parser.add_argument("--held-out-length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", type=Path, help="a directory, see quality.py")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


@silent()
def main() -> None:
    """Parse, run, write after every seed."""
    options = arguments()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    result: dict[str, Any] = {
        "model": quality.model_record(options.model),
        "settings": {
            k: v for k, v in vars(options).items() if k not in ("model", "cache", "output")
        },
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        **provenance.origin(["planning", "effort"]),
        "seeds": [],
    }
    for seed in options.seeds:
        result["seeds"].append(of_seed(model, tokenizer, seed, options))
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
