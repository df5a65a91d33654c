"""Criteria against numbers of removed layers on one model: plans, quality, and what plans cost."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from simdiff.bypass import BypassEvaluator
from simdiff.calibration import TokenWindows
from simdiff.comparison_plans import COMPARED, Cell, CellJournal, Planner
from simdiff.comparison_results import ComparedCell, Comparison
from simdiff.criteria import DEFAULT_ALPHA, check_criterion
from simdiff.errors import SimdiffError
from simdiff.evaluation import window_losses
from simdiff.files import header, read_json, write_json
from simdiff.intervals import CONFIDENCE, PerplexityInterval, perplexity_interval
from simdiff.journal import Evaluation, EvaluationJournal, check_key, evaluation_key
from simdiff.machine import describe_machine
from simdiff.models import find_decoder_layers, model_identity
from simdiff.progress import track
from simdiff.scores import LayerScores, score
from simdiff.selection import check_selection
from simdiff.surgery import removed_layers


@dataclass(frozen=True)
class ComparisonOptions:
    """What is compared."""

    criteria: tuple[str, ...] = COMPARED
    num_layers: tuple[int, ...] = ()
    """Numbers of layers to remove; none means six steps up to two fifths of the depth."""
    alpha: float = DEFAULT_ALPHA
    protect: Collection[int] = ()
    random_seed: int = 0
    search_windows: int = 8
    """Calibration windows on which searches and sweeps evaluate."""
    evaluation_windows: int = 4
    """Calibration windows on which simdiff chooses among a few plans; 0 takes the first one."""

    def counts(self, depth: int) -> tuple[int, ...]:
        """The numbers of layers to remove; refuses what cannot be met, before any work.

        Raises:
            SimdiffError: unknown criteria, alpha outside [0, 1], layers that are not there, too few
                that are free.
        """
        unknown = [name for name in self.criteria if name not in COMPARED]
        if unknown or not self.criteria:
            raise SimdiffError(
                f"criteria must be among {', '.join(COMPARED)}, got {', '.join(unknown) or 'none'}"
            )
        check_criterion("simdiff", self.alpha)
        if self.search_windows < 1:
            raise SimdiffError(f"search windows must be at least 1, got {self.search_windows}")
        if self.evaluation_windows < 0:
            raise SimdiffError(
                f"evaluation windows must be 0 or more, got {self.evaluation_windows}"
            )
        steps = {max(1, round(depth * step / 15)) for step in range(1, 7)}
        counts = tuple(sorted(set(self.num_layers) or steps))
        for count in counts:
            check_selection(depth, count, self.protect)
        return counts


def compare(
    model: PreTrainedModel,
    calibration: TokenWindows,
    held_out: TokenWindows,
    options: ComparisonOptions,
    journal: Path,
    *,
    name: str = "",
    batch_size: int = 8,
) -> Comparison:
    """Make all plans and measure each on held-out text, going on where an earlier call stopped.

    Args:
        model: dense.
        calibration: scored; searches see its first windows.
        held_out: the quality is measured on it alone.
        options: what is compared.
        journal: a directory that keeps what is finished; made if it is not there.
        name: of the model, for the record.
        batch_size: windows per forward while scoring.

    Raises:
        SimdiffError: options that cannot be met; a journal of other input, or in use.
        simdiff_kernels.NonFiniteError: a hidden state of the dense model held NaN or Inf.
    """
    options.counts(len(find_decoder_layers(model)))
    journal.mkdir(exist_ok=True)
    with _held(journal):
        return _compare(model, calibration, held_out, options, journal, name, batch_size)


@contextlib.contextmanager
def _held(journal: Path) -> Iterator[None]:
    """Keep other processes out; the lock ends with this one, however it ends."""
    descriptor = os.open(journal, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SimdiffError(
                f"{journal} must be used by one comparison at a time, and another one runs"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _compare(
    model: PreTrainedModel,
    calibration: TokenWindows,
    held_out: TokenWindows,
    options: ComparisonOptions,
    journal: Path,
    name: str,
    batch_size: int,
) -> Comparison:
    counts = options.counts(len(find_decoder_layers(model)))
    windows = calibration.tokens[: options.search_windows]
    choice_windows = calibration.tokens[: options.evaluation_windows]
    scores, seconds = _scored(model, calibration, journal, name, batch_size)
    evaluator = BypassEvaluator(model, windows)
    search_key = evaluation_key(model, windows, calibration.identity.to_dict())
    with EvaluationJournal(search_key, journal / "search.json", evaluator.losses) as evaluate:
        planner = Planner(
            model, scores, seconds, windows, choice_windows if len(choice_windows) else None,
            evaluate, evaluator,
            alpha=options.alpha, protect=options.protect, random_seed=options.random_seed,
        )  # fmt: skip
        chosen = {
            "alpha": options.alpha,
            "protect": sorted(options.protect),
            "random_seed": options.random_seed,
            "evaluation_windows": len(choice_windows),
            "scored_tokens": scores.num_tokens,
        }
        done = CellJournal(journal, {**search_key, **chosen})
        for criterion in options.criteria:
            for count in counts:
                if (criterion, count) not in done.cells:
                    done.add(planner.cell(criterion, count))
    cells = [done.cells[criterion, count] for count in counts for criterion in options.criteria]
    dense, compared = _measured(model, held_out, cells, journal)
    provenance = {
        "machine": describe_machine(),
        "num_threads": torch.get_num_threads(),
        "model": model_identity(model, name),
        "calibration": calibration.identity.to_dict(),
        "held_out": held_out.identity.to_dict(),
        "search_windows": len(windows),
        "scoring_seconds": seconds,
        "options": {**chosen, "criteria": list(options.criteria), "num_layers": list(counts)},
        "intervals": {"confidence": CONFIDENCE, "of": "Student's t over windows"},
    }
    return Comparison(scores, dense, tuple(compared), provenance)


def remove_journal(journal: Path) -> None:
    """Forget what an interrupted comparison left; only files that one writes are removed."""
    if journal.is_dir():
        if any(".json" not in entry.name for entry in journal.iterdir()):
            raise SimdiffError(f"{journal} holds other files than a comparison leaves: not removed")
        shutil.rmtree(journal)


def _scored(
    model: PreTrainedModel, calibration: TokenWindows, journal: Path, name: str, batch_size: int
) -> tuple[LayerScores, float]:
    """The calibration pass, or the one that an earlier call made; and how long it took."""
    key = evaluation_key(model, calibration.tokens, calibration.identity.to_dict())
    path, scores_path = journal / "scoring.json", journal / "scores.json"
    if path.exists():
        content = read_json(path, "simdiff.comparison-scoring", 1)
        check_key(path, content.get("key"), {**key, "name": name, "batch_size": batch_size})
        return LayerScores.load(scores_path), float(content["seconds"])
    start = time.perf_counter()
    scores = score(
        model,
        calibration.batches(batch_size),
        name=name,
        calibration=calibration.identity.to_dict(),
    )
    seconds = time.perf_counter() - start
    scores.save(scores_path)
    content = {"key": {**key, "name": name, "batch_size": batch_size}, "seconds": seconds}
    write_json(path, {**header("simdiff.comparison-scoring", 1), **content})
    return scores, seconds


def _measured(
    model: PreTrainedModel, held_out: TokenWindows, cells: Sequence[Cell], journal: Path
) -> tuple[PerplexityInterval, list[ComparedCell]]:
    """Each distinct plan once, its layers taken out as they would be for a checkpoint."""

    def losses(removed: frozenset[int]) -> list[float]:
        if not removed:
            return window_losses(model, held_out.tokens, description=None)
        with removed_layers(model, removed):
            return window_losses(model, held_out.tokens, description=None)

    key = evaluation_key(model, held_out.tokens, held_out.identity.to_dict())
    sets = {frozenset(cell.plan.removed) for cell in cells if cell.plan is not None}
    found: dict[frozenset[int], Evaluation] = {}
    refused: dict[frozenset[int], str] = {}
    with EvaluationJournal(key, journal / "held-out.json", losses) as evaluate:
        for removed in track([frozenset(), *sorted(sets, key=sorted)], "held-out perplexity"):
            try:
                found[removed] = evaluate(removed)
            except SimdiffError as error:  # stock classes cannot express the cut
                refused[removed] = str(error)
    dense = found[frozenset()]
    if not math.isfinite(dense.perplexity):
        raise SimdiffError(
            f"compare: the dense model must have a finite held-out perplexity, got "
            f"{dense.perplexity}"
        )
    compared = [_compared(cell, found, refused, dense.losses) for cell in cells]
    return perplexity_interval(dense.losses, dense.losses), compared


def _compared(
    cell: Cell,
    found: Mapping[frozenset[int], Evaluation],
    refused: Mapping[frozenset[int], str],
    dense: Sequence[float],
) -> ComparedCell:
    if cell.plan is None:
        return ComparedCell(cell, None, cell.problem)
    removed = frozenset(cell.plan.removed)
    if removed in refused:
        return ComparedCell(cell, None, refused[removed])
    if not math.isfinite(found[removed].perplexity):
        return ComparedCell(cell, None, "the held-out perplexity is NaN or Inf")
    return ComparedCell(cell, perplexity_interval(found[removed].losses, dense), None)
