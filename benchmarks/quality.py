"""The quality protocol: every way to choose layers on equal terms, on text no decision has seen.

    python benchmarks/quality.py MODEL --text wikipedia --seeds 1 2 3 --output RESULT.json

For each seed the documents of a text are divided anew (`texts.py`); all ways choose from the same
calibration windows, and each distinct plan is measured once on held-out windows, whose losses are
all kept, so that any two ways can be compared window by window.

Ways, each for 10% and 25% of the layers (rounded):

- criteria of scores alone, as `make_plan` gives them;
- the same criteria with as many reads as `simdiff` has: the exchange search from their plan, in the
  order of their own costs (sums of importances where a criterion knows no blocks);
- searches by perplexity: one-shot on four windows, greedy on one, four and, with `--greedy 16`,
  sixteen; the paper's criteria with alpha swept on four windows;
- ablations: `simdiff` without its exchanges, and with the exponent 1.

A window read is one forward over one calibration window. Seconds are those of the calibration pass,
where the way takes scores, and of its own reads, each as long as it took when it was first made.
`--cache` keeps every loss, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import provenance
import texts
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError
from simdiff.io.machine import describe_machine
from simdiff.io.progress import silent
from simdiff.models.loading import load_model
from simdiff.planning.alpha_sweep import sweep_alpha
from simdiff.planning.block_costs import block_costs
from simdiff.planning.blocks import optimal_blocks
from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.criteria import CRITERIA, importance
from simdiff.planning.exchange import CutLosses, affordable_reads, exchange_search
from simdiff.planning.make_plan import BLOCK_CRITERION_OF, make_plan
from simdiff.planning.shortlist import EXPONENT, Candidate, shortlist
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import SurgeryError, layers_removed

Plan = tuple[int, ...]
Key = tuple[str, Plan, int]

SHARES = (0.1, 0.25)
SEARCH_WINDOWS = 4
"""As `simdiff plan` has it: what searches read, and of which `simdiff` spends 1/50."""
SWEPT = ("simdiff-mssd", "simdiff-masd", "simdiff-max")


class Additive:
    """Costs of plans for a criterion of single layers: the sum of their importances."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values, self.num_layers = values, len(values)

    def plan_cost(self, plan: Plan) -> float:
        return math.fsum(self.values[layer] for layer in plan)


class Reads:
    """Losses of plans on calibration windows, counted, timed, and kept in a file."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, path: Path | None) -> None:
        self.model, self.windows, self.path = model, windows, path
        self.known: dict[Key, tuple[Tensor | None, float]] = {}
        if path is not None and path.exists():
            self.known = torch.load(path)
        self.count, self.seconds, self.new = 0, 0.0, 0
        self._losses = CutLosses(model, windows[:SEARCH_WINDOWS])
        self._evaluators: dict[int, BypassEvaluator] = {}

    def take(self) -> tuple[int, float]:
        """Windows read and seconds since the last call."""
        spent = self.count, self.seconds
        self.count, self.seconds = 0, 0.0
        return spent

    def _get(self, key: Key, run: Callable[[], Tensor | None]) -> Tensor | None:
        if key not in self.known:
            start = time.perf_counter()
            found = run()
            self.known[key] = found, time.perf_counter() - start
            self.new += 1
            if self.new % 20 == 0:
                self.save()
        found, seconds = self.known[key]
        self.seconds += seconds
        return found

    def tokens(self, plan: Plan, window: int) -> Tensor | None:
        """Losses of all tokens of a window, as the exchange search takes them."""

        self.count += 1
        return self._get(
            ("tokens", tuple(sorted(plan)), window), lambda: self._losses(plan, window)
        )

    def mean(self, plan: Plan, num_windows: int) -> float:
        """Over the first windows, by an evaluator that reuses what enters the first change."""
        if num_windows not in self._evaluators:
            windows = self.windows[:num_windows]
            self._evaluators[num_windows] = BypassEvaluator(self.model, windows)
        evaluator = self._evaluators[num_windows]
        self.count += num_windows
        found = self._get(
            ("mean", tuple(sorted(plan)), num_windows), lambda: torch.tensor(evaluator.losses(plan))
        )
        assert found is not None
        loss = float(found.double().mean())
        return loss if math.isfinite(loss) else math.inf

    def rebase(self, plan: Plan, num_windows: int) -> None:
        if num_windows in self._evaluators:
            self._evaluators[num_windows].rebase(plan)

    def save(self) -> None:
        """Whole or not at all."""
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            torch.save(self.known, partial)
            os.replace(partial, self.path)


class Ways:
    """All ways to choose `count` layers, each a generator of rows."""

    def __init__(
        self, scores: LayerScores, scoring_seconds: float, reads: Reads, options: Any
    ) -> None:
        self.scores, self.scoring_seconds, self.reads = scores, scoring_seconds, reads
        self.options = options
        self.depth = scores.num_layers

    def _row(
        self, way: str, count: int, choose: Callable[[], Plan], scored: bool = True
    ) -> dict[str, Any]:
        self.reads.take()
        start = time.perf_counter()
        try:
            plan, problem = tuple(sorted(choose())), None
        except SimdiffError as error:
            plan, problem = None, str(error)
        own = time.perf_counter() - start
        windows, seconds = self.reads.take()
        passed = self.scoring_seconds if scored else 0.0
        print(f"  {way}, {count}: {plan or problem}, {windows} reads, {own:.1f} s", flush=True)
        return {
            "way": way,
            "removed": count,
            "layers": plan,
            "windows_read": windows,
            "seconds": round(passed + (seconds or own), 2),
            "problem": problem,
        }

    def rows(self, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Of the way's own calibration text."""
        for count in counts:
            for name in self.options.criteria:
                scored = name not in ("random", "last-n")
                yield self._row(name, count, lambda n=name, c=count: self.alone(n, c), scored)
            yield self._row("simdiff + reads", count, lambda c=count: self.default(c))
            yield from self.ablations(count)
            for name in self.options.with_reads:
                yield self._row(f"{name} + reads", count, lambda n=name, c=count: self.read(n, c))
        if not self.options.greedy:
            return
        for count in counts:
            for name in SWEPT:
                yield self._row(
                    f"{name}, alpha swept", count, lambda n=name, c=count: tuple(self.swept(n, c))
                )
            yield self._row(
                "one-shot perplexity, 4 windows",
                count,
                lambda c=count: self.one_shot(c),
                scored=False,
            )
        for windows in self.options.greedy:
            for count in counts:
                yield self._row(
                    f"greedy perplexity, {windows} windows",
                    count,
                    lambda c=count, w=windows: self.greedy(c, w),
                    scored=False,
                )

    def alone(self, name: str, count: int) -> Plan:
        return make_plan(self.scores, count, criterion=name, random_seed=self.options.seed).removed

    def default(self, count: int, *, exchanges: bool = True, p: float = EXPONENT) -> Plan:
        """As `make_plan` does with a model; the arguments leave parts out."""
        first, *others = shortlist(self.scores, count)
        costs = block_costs(self.scores).raised(p)
        if p != EXPONENT:
            first = Candidate(tuple(sorted(optimal_blocks(costs, count))), f"p = {p:.3g}")
        reads = affordable_reads(self.depth, count, SEARCH_WINDOWS) if exchanges else 0
        best, _, _ = exchange_search(
            self.reads.tokens, [first, *others], costs, max_reads=reads, num_windows=SEARCH_WINDOWS
        )
        return best.removed

    def ablations(self, count: int) -> Iterator[dict[str, Any]]:
        for label, without in {
            "no exchanges": {"exchanges": False},
            "p = 1": {"p": 1.0},
        }.items():
            yield self._row(
                f"simdiff + reads, {label}", count, lambda c=count, w=without: self.default(c, **w)
            )
        yield self._row(
            "simdiff, p = 1",
            count,
            lambda c=count: tuple(optimal_blocks(block_costs(self.scores), c)),
        )

    def read(self, name: str, count: int) -> Plan:
        """A criterion's own plan, then exchanges in the order of its own costs."""
        start = make_plan(self.scores, count, criterion=name, random_seed=self.options.seed)
        costs: Any = (
            block_costs(self.scores, BLOCK_CRITERION_OF[name])
            if name in BLOCK_CRITERION_OF and name != "block-influence"
            else Additive(importance(self.scores, name, seed=self.options.seed).values)
        )
        best, _, _ = exchange_search(
            self.reads.tokens,
            [Candidate(tuple(sorted(start.removed)), name)],
            costs,
            max_reads=affordable_reads(self.depth, count, SEARCH_WINDOWS),
            num_windows=SEARCH_WINDOWS,
        )
        return best.removed

    def swept(self, name: str, count: int) -> Plan:
        self.reads.rebase((), SEARCH_WINDOWS)
        found = sweep_alpha(
            self.scores,
            name,
            count,
            lambda gone: math.exp(min(700.0, self.reads.mean(tuple(gone), SEARCH_WINDOWS))),
            (),
        )
        return tuple(found.best.removed)

    def one_shot(self, count: int) -> Plan:
        self.reads.rebase((), SEARCH_WINDOWS)
        order = sorted(range(self.depth), key=lambda k: self.reads.mean((k,), SEARCH_WINDOWS))
        return tuple(order[:count])

    def greedy(self, count: int, num_windows: int) -> Plan:
        removed: Plan = ()
        for _ in range(count):
            self.reads.rebase(removed, num_windows)
            candidates = [(*removed, k) for k in range(self.depth) if k not in removed]
            removed = min(candidates, key=lambda plan: self.reads.mean(plan, num_windows))
        return removed


def of_seed(model: PreTrainedModel, tokenizer: Any, seed: int, options: Any) -> dict[str, Any]:
    """All ways on one division of the text."""
    divided = texts.halves(options.text, options.pool, seed)
    options.seed = seed

    def windows(documents: list[str], count: int, length: int) -> Tensor:
        found = token_windows(
            documents, tokenizer, part="all", num_windows=count, window_length=length
        ).tokens
        if len(found) < count:
            raise SystemExit(f"{options.text}: must fill {count} windows, got {len(found)}")
        return found

    calibration = windows(divided.calibration, options.windows, options.window_length)
    held_out = windows(divided.held_out, options.held_out_windows, options.held_out_length)
    start = time.perf_counter()
    scores = score(model, list(calibration.split(8)), progress=False)
    seconds = time.perf_counter() - start
    name = f"{Path(options.model).name}-{Path(options.text).stem}-{options.pool}-{seed}.pt"
    path = options.cache and options.cache / name
    reads = Reads(model, calibration, path)
    counts = [max(1, round(share * scores.num_layers)) for share in SHARES]
    print(f"seed {seed}, {seconds:.1f} s of calibration", flush=True)
    rows = list(Ways(scores, seconds, reads, options).rows(counts))
    plans = sorted({row["layers"] for row in rows if row["layers"]})
    losses: dict[str, list[float] | None] = {}
    evaluator = BypassEvaluator(model, held_out)
    for plan in [(), *plans]:
        label = " ".join(map(str, plan)) or "dense"
        key: Key = ("held-out", plan, options.held_out_windows)
        if key not in reads.known:
            began = time.perf_counter()
            try:
                with layers_removed(model, plan) if plan else contextlib.nullcontext():
                    pass
                measured = torch.tensor(evaluator.losses(plan), dtype=torch.float64)
            except SurgeryError:
                measured = None
            reads.known[key] = measured, time.perf_counter() - began
        found = reads.known[key][0]
        losses[label] = None if found is None else [round(v, 5) for v in found.tolist()]
    reads.save()
    for row in rows:
        row["layers"] = row["layers"] and " ".join(map(str, row["layers"]))
        if row["layers"] and losses[row["layers"]] is None:
            row["problem"] = "no config of the stock class expresses this cut"
    return {
        "seed": seed,
        "documents_sha256": divided.sha256,
        "licence": divided.licence,
        "calibration_seconds": round(seconds, 2),
        "rows": rows,
        "held_out_losses": losses,
    }


def model_record(name: str) -> dict[str, Any]:
    """What the weights are: their hash, and of which file they were converted."""
    from simdiff.data.demo import DEMO, demo_model

    folder = demo_model() if name == DEMO else Path(name)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    source = folder / "source.json"
    return {
        "name": folder.name,
        "safetensors_sha256": digest.hexdigest(),
        "converted_from": json.loads(source.read_text()) if source.exists() else None,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--text", default="wikipedia", help="wikipedia, python or a file")
    parser.add_argument("--pool", choices=texts.POOLS, default="reporting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--windows", type=int, default=16, help="that calibrate")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--held-out-windows", type=int, default=16)
    parser.add_argument("--held-out-length", type=int, default=256)
    parser.add_argument("--greedy", type=int, nargs="*", default=[1, 4], help="windows of each")
    parser.add_argument(
        "--with-reads",
        nargs="*",
        choices=list(CRITERIA),
        default=[name for name in CRITERIA if name != "simdiff"],
    )
    parser.add_argument("--criteria", nargs="*", choices=list(CRITERIA), default=list(CRITERIA))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", type=Path, help="a directory")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


@silent()
def main() -> None:
    """Parse, run, write after every seed."""
    options = arguments()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    settings = {
        key: value
        for key, value in vars(options).items()
        if key not in ("cache", "output", "model", "seeds")
    }
    result: dict[str, Any] = {
        "model": model_record(options.model),
        "settings": settings,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **provenance.origin(["planning"]),
        "seeds": [],
    }
    for seed in options.seeds:
        result["seeds"].append(of_seed(model, tokenizer, seed, options))
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
