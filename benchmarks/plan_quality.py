"""Held-out perplexity of plans: what each part of `simdiff` brings, and greedy search beside it.

    python benchmarks/plan_quality.py demo --output benchmarks/results/plan-quality-2-cores.csv

Every row is one plan: number of layers removed, method, layers, held-out perplexity and its ratio
to that of greedy search, windows read to plan after the calibration pass, their fraction of what
greedy search reads, the same with the calibration pass, seconds. Greedy search removes one layer at
a time, each time the one whose removal leaves the lowest perplexity on calibration windows (SLEB,
arXiv 2402.09025). `--greedy 0` leaves it out, which saves most of the time; `--greedy-order` takes
the order in which an earlier search removed layers.

With `--cache` every loss is kept in a file, so that an interrupted run goes on where it was; rows
that took losses from it have no seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import provenance
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.block_costs import block_costs, decisive_layers
from simdiff.block_selection import best_contiguous_block, optimal_blocks
from simdiff.calibration import token_windows
from simdiff.criteria import importance
from simdiff.errors import SimdiffError
from simdiff.evaluation import token_losses
from simdiff.exchange import affordable_reads, exchange_search
from simdiff.models import load_model
from simdiff.planning import make_plan
from simdiff.progress import silent
from simdiff.scores import LayerScores, score
from simdiff.shortlist import EXPONENTS, lowest_influence, shortlist
from simdiff.surgery import SurgeryError, removed_layers

GREEDY = "greedy perplexity search"
Plan = tuple[int, ...]
Mark = tuple[int, int, float]


class Losses:
    """Losses per token of plans on windows, kept in a file where one is given."""

    def __init__(
        self, model: PreTrainedModel, parts: dict[str, Tensor], identity: str, path: Path | None
    ) -> None:
        self.model, self.parts, self.identity, self.path = model, parts, identity, path
        self.known: dict[tuple[str, Plan, int], Tensor | None] = {}
        if path is not None and path.exists():
            kept = torch.load(path)
            if kept["identity"] != identity:
                raise SystemExit(f"{path}: must hold losses of {identity}, got {kept['identity']}")
            self.known = kept["losses"]
        self.reads = self.computed = 0

    def __call__(self, part: str, plan: Plan, window: int) -> Tensor | None:
        """On one window; None where the model cannot express the cut."""
        key = (part, tuple(sorted(plan)), window)
        self.reads += 1
        if key not in self.known:
            self.computed += 1
            try:
                with removed_layers(self.model, plan) if plan else contextlib.nullcontext():
                    self.known[key] = token_losses(self.model, self.parts[part][window]).clone()
            except SurgeryError:
                self.known[key] = None
            if self.computed % 20 == 0:
                self.save()
        return self.known[key]

    def mark(self) -> Mark:
        """Reads so far, how many of them were not in the file, and the time."""
        return self.reads, self.computed, time.perf_counter()

    def save(self) -> None:
        """Whole or not at all."""
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            torch.save({"identity": self.identity, "losses": self.known}, partial)
            os.replace(partial, self.path)

    def nll(self, part: str, plan: Plan, num_windows: int) -> float:
        """Mean over windows that predict equally many tokens; Inf where the plan is out."""
        losses = [self(part, plan, window) for window in range(num_windows)]
        found = [float(loss.double().mean()) for loss in losses if loss is not None]
        total = sum(found) / num_windows
        return total if len(found) == num_windows and math.isfinite(total) else math.inf


def greedy(losses: Losses, num_layers: int, num_windows: int, count: int) -> Iterator[Plan]:
    """One layer after the other."""
    removed: Plan = ()
    for _ in range(count):
        candidates = [(*removed, layer) for layer in range(num_layers) if layer not in removed]
        removed = min(candidates, key=lambda plan: losses.nll("calibration", plan, num_windows))
        yield removed


def methods(
    scores: LayerScores, windows: Tensor, losses: Losses
) -> dict[str, Callable[[int], Plan]]:
    """From a number of layers to a plan; the names say what is left out or put in place."""

    def lowest(name: str, alpha: float = 0.5) -> Callable[[int], Plan]:
        return lambda count: tuple(importance(scores, name, alpha).ranking()[:count])

    def blocks(name: str) -> Callable[[int], Plan]:
        return lambda count: optimal_blocks(block_costs(scores, name), count)

    def default(**options: object) -> Callable[[int], Plan]:
        return lambda count: make_plan(scores, count, **options).removed  # type: ignore[arg-type]

    def of_windows(plan: Plan, window: int) -> Tensor | None:
        return losses("calibration", plan, window)

    def searched(count: int, search_windows: int = len(windows)) -> Plan:
        """As `make_plan` does, the losses kept; without windows to search, the shortlist's best."""
        held = frozenset(decisive_layers(scores))
        plans = shortlist(scores, count, held)
        costs = block_costs(scores).raised(EXPONENTS[0])
        max_reads = affordable_reads(scores.num_layers, count, search_windows)
        best, _ = exchange_search(
            of_windows, plans, costs, max_reads=max_reads, num_windows=len(windows), protect=held,
            reference=lowest_influence(scores, count, held),
        )  # fmt: skip
        return best.removed

    return {
        "simdiff": searched,
        "simdiff, no exchanges": lambda count: searched(count, 0),
        "simdiff, no evaluations": default(),
        "simdiff, decisive layers free": default(keep_decisive=False),
        "simdiff, lowest": lowest("simdiff"),
        "cosine distance, blocks": blocks("cosine-distance"),
        "norm change, blocks": blocks("norm-change"),
        "simdiff, contiguous": lambda n: best_contiguous_block(block_costs(scores), n),
        "block influence": lowest("block-influence"),
        "SimDiff, MASD, alpha 0.5": lowest("simdiff-masd"),
    }


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--layers", type=int, nargs="+", default=[*range(2, 13)])
    parser.add_argument("--methods", nargs="+", help="all of them if left out")
    parser.add_argument("--windows", type=int, default=16, help="that calibrate")
    parser.add_argument("--evaluation-windows", type=int, default=4, help="of those, to choose")
    parser.add_argument("--held-out-windows", type=int, default=8)
    parser.add_argument("--held-out-length", type=int, default=256)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--greedy", type=int, default=4, help="windows of the search; 0: none")
    parser.add_argument("--greedy-order", type=int, nargs="+", help="of an earlier search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", type=Path, help="losses of evaluated plans")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


class Table:
    """One row for each plan, printed as soon as it is known."""

    def __init__(self, losses: Losses, num_layers: int, options: argparse.Namespace) -> None:
        self.losses, self.num_layers, self.options = losses, num_layers, options
        self.rows: list[dict[str, str]] = []
        self.best: dict[int, float] = {}
        """Perplexity of greedy search by number of layers."""

    def add(self, method: str, plan: Plan, start: Mark, end: Mark) -> None:
        """What a method chose, and what it took from its start to its end."""
        options = self.options
        reads, computed, seconds = (
            after - before for before, after in zip(start, end, strict=True)
        )
        nll = self.losses.nll("held-out", plan, options.held_out_windows)
        found = math.exp(min(nll, 700))
        count, search = len(plan), options.greedy or options.evaluation_windows
        if method == GREEDY:
            self.best[count] = found
        of_search = (self.num_layers * count - count * (count - 1) // 2) * search
        with_pass = count and method != GREEDY
        row = {
            "removed": str(count),
            "method": method,
            "layers": " ".join(map(str, sorted(plan))),
            "perplexity": f"{found:.3f}",
            "to greedy": f"{found / self.best[count]:.3f}" if count in self.best else "",
            "windows read": str(reads),
            "of greedy's": f"1/{of_search / reads:.0f}" if reads and count else "",
            "with calibration": f"1/{of_search / (reads + options.windows):.0f}"
            if with_pass
            else "",
            "seconds": f"{seconds:.2f}" if computed == reads else "",
        }
        self.rows.append(row)
        print("  ".join(row.values()), flush=True)

    def write(self) -> None:
        """As CSV; rows of equally many layers together."""
        self.losses.save()
        with open(self.options.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(self.rows, key=lambda row: int(row["removed"])))


@silent()
def main() -> None:
    """Parse, run, write."""
    options = arguments()
    model, tokenizer = load_model(options.model, dtype=options.dtype)

    def text(part: str, count: int, length: int) -> Tensor:
        return token_windows(options.text, tokenizer, part=part, num_windows=count,
                             window_length=length, seed=options.seed).tokens  # fmt: skip

    calibration = text("calibration", options.windows, options.window_length)
    held_out = text("held-out", options.held_out_windows, options.held_out_length)
    parts = {"calibration": calibration, "held-out": held_out}
    shapes = {part: tuple(windows.shape) for part, windows in parts.items()}
    identity = f"{options.model}, {options.dtype}, {options.text}, seed {options.seed}, {shapes}"
    losses = Losses(model, parts, identity, options.cache)
    began = time.perf_counter()
    scores = score(model, list(calibration.split(8)), progress=False)
    print(f"calibration pass: {time.perf_counter() - began:.2f} s", flush=True)
    table = Table(losses, scores.num_layers, options)
    table.add("dense", (), losses.mark(), losses.mark())
    start = losses.mark()
    order = options.greedy_order or ()
    if order:
        search = iter([tuple(order[: n + 1]) for n in range(len(order))])
    else:
        steps = max(options.layers) if options.greedy else 0
        search = greedy(losses, scores.num_layers, options.greedy, steps)
    for plan, end in [(plan, losses.mark()) for plan in search]:
        if len(plan) in options.layers:
            table.add(GREEDY, plan, start, end)
    chosen = methods(scores, calibration[: options.evaluation_windows], losses)
    for count in options.layers:
        for name in options.methods or chosen:
            start = losses.mark()
            try:
                plan = chosen[name](count)
            except SimdiffError as error:
                print(f"{count}  {name}  {error}")
                continue
            table.add(name, plan, start, losses.mark())
        table.write()
    provenance.keep([options.output], ["calibration pass", "planning"])


if __name__ == "__main__":
    with torch.inference_mode():
        main()
