"""Compare criteria at several numbers of removed layers: plans, their quality and their cost."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from simdiff.comparison.plans import Cell, CellJournal, Planner
from simdiff.comparison.results import ComparedCell, Comparison
from simdiff.data.text import TokenWindows
from simdiff.errors import SimdiffError
from simdiff.evaluation.intervals import CONFIDENCE, PerplexityInterval, perplexity_interval
from simdiff.evaluation.journal import Evaluation, EvaluationJournal, evaluation_key
from simdiff.evaluation.losses import window_losses
from simdiff.evaluation.streamed_losses import in_few_passes
from simdiff.io import ranks
from simdiff.io.json_files import check_key, header, read_json, write_json
from simdiff.io.machine import describe_machine
from simdiff.io.outputs import held_directory
from simdiff.io.progress import track
from simdiff.models.identity import model_identity
from simdiff.models.streamed import stream_of
from simdiff.models.structure import find_decoder_layers
from simdiff.models.windows import check_windows
from simdiff.planning.criteria import check_criterion
from simdiff.planning.entry_points import known_criteria
from simdiff.planning.make_plan import check_effort, default_effort
from simdiff.planning.names import ALL_CRITERIA, DEFAULT_ALPHA
from simdiff.planning.selection import check_selection
from simdiff.planning.streamed_search import StreamedEvaluator, evaluator_of
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import layers_removed


@dataclass(frozen=True)
class ComparisonOptions:
    """The criteria and the numbers of layers to compare, and the text that searches read."""

    criteria: tuple[str, ...] = ALL_CRITERIA
    num_layers: tuple[int, ...] = ()
    """Numbers of layers to remove; empty takes six steps up to two fifths of the depth."""
    alpha: float = DEFAULT_ALPHA
    protect: Collection[int] = ()
    random_seed: int = 0
    search_windows: int = 8
    """Number of calibration windows on which searches and sweeps evaluate."""
    evaluation_windows: int = 4
    """Number of calibration windows on which `simdiff` chooses among a few plans; 0 takes the first
    plan."""
    effort: str | None = None
    """How much `simdiff` may spend, see `make_plan`."""

    def counts(self, depth: int) -> tuple[int, ...]:
        """The numbers of layers to remove; refuses impossible options before any work.

        Raises:
            SimdiffError: a criterion is unknown, alpha is outside [0, 1], a layer does not exist,
                or too few layers are not protected.
        """
        unknown = [name for name in self.criteria if name not in known_criteria()]
        if unknown or not self.criteria:
            raise SimdiffError(
                f"criteria must be among {', '.join(known_criteria())}, got "
                f"{', '.join(unknown) or 'none'}"
            )
        check_criterion("simdiff", self.alpha)
        check_effort(self.effort)
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
    """Make all plans and measure each on held-out text; resume where an earlier call stopped.

    Args:
        model: the dense model.
        calibration: windows to score; searches read the first of them.
        held_out: windows on which the quality of plans is measured.
        options: the criteria and numbers of layers.
        journal: directory for finished work; it is made if it does not exist.
        name: name of the model, for the record.
        batch_size: windows per forward while scoring.

    Raises:
        SimdiffError: the options are impossible, or the journal is of another input or in use.
        simdiff_kernels.NonFiniteError: a hidden state of the dense model contains NaN or Inf.
    """
    options.counts(len(find_decoder_layers(model)))
    check_windows(model, [calibration.tokens, held_out.tokens], "compare")
    with held_directory(journal, "comparison"):
        return _compare(model, calibration, held_out, options, journal, name, batch_size)


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
    effort = options.effort or default_effort(model)
    scores, seconds = _scored(model, calibration, journal, name, batch_size)
    evaluator = evaluator_of(model, windows)
    search_key = evaluation_key(model, windows, calibration.identity.to_dict())
    shares = evaluator.seconds if isinstance(evaluator, StreamedEvaluator) else None
    path = journal / "search.json"
    with EvaluationJournal(search_key, path, evaluator.losses, shares) as evaluate:
        planner = Planner(
            model,
            scores,
            seconds,
            windows,
            choice_windows if len(choice_windows) else None,
            evaluate,
            evaluator,
            calibration=calibration.tokens,
            effort=effort,
            alpha=options.alpha,
            protect=options.protect,
            random_seed=options.random_seed,
        )
        chosen = {
            "alpha": options.alpha,
            "protect": sorted(options.protect),
            "random_seed": options.random_seed,
            "evaluation_windows": len(choice_windows),
            "effort": effort,
            "scored_tokens": scores.num_tokens,
        }
        done = CellJournal(journal, {**search_key, **chosen})
        wanted = [(criterion, count) for criterion in options.criteria for count in counts]
        due = [cell for cell in wanted if cell not in done.cells]
        if stream_of(model) is not None:  # all plans together, in few passes
            for made in in_few_passes(model, lambda: [planner.cell(*cell) for cell in due]):
                done.add(made)
        else:
            for criterion, count in due:
                done.add(planner.cell(criterion, count))
    cells = [done.cells[criterion, count] for count in counts for criterion in options.criteria]
    dense, compared = in_few_passes(model, partial(_measured, model, held_out, cells, journal))
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
    """Remove the journal of a comparison; files that a comparison did not write stay."""
    if journal.is_dir():
        if any(".json" not in entry.name for entry in journal.iterdir()):
            raise SimdiffError(f"{journal} holds other files than a comparison leaves: not removed")
        shutil.rmtree(journal)


def _scored(
    model: PreTrainedModel, calibration: TokenWindows, journal: Path, name: str, batch_size: int
) -> tuple[LayerScores, float]:
    """Score the layers, or load the scores of an earlier call; return them and the seconds."""
    key = evaluation_key(model, calibration.tokens, calibration.identity.to_dict())
    path, scores_path = journal / "scoring.json", journal / "scores.json"

    def earlier() -> tuple[LayerScores, float] | None:
        if not path.exists():
            return None
        content = read_json(path, "simdiff.comparison-scoring")
        check_key(path, content.get("key"), {**key, "name": name, "batch_size": batch_size})
        return LayerScores.load(scores_path), float(content["seconds"])

    known = ranks.first(earlier)
    if known is not None:
        return known
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
    write_json(path, {**header("simdiff.comparison-scoring"), **content})
    return scores, seconds


def _measured(
    model: PreTrainedModel, held_out: TokenWindows, cells: Sequence[Cell], journal: Path
) -> tuple[PerplexityInterval, list[ComparedCell]]:
    """Measure each distinct plan once, its layers removed as for a checkpoint."""

    evaluator = None if stream_of(model) is None else evaluator_of(model, held_out.tokens)

    def losses(removed: frozenset[int]) -> list[float] | None:
        if evaluator is not None:
            if removed:
                with layers_removed(model, removed):  # raises if stock classes cannot express it
                    pass
            return evaluator.losses(removed)
        if not removed:
            return window_losses(model, held_out.tokens, description=None)
        with layers_removed(model, removed):
            return window_losses(model, held_out.tokens, description=None)

    key = evaluation_key(model, held_out.tokens, held_out.identity.to_dict())
    sets = {frozenset(cell.plan.removed) for cell in cells if cell.plan is not None}
    found: dict[frozenset[int], Evaluation] = {}
    refused: dict[frozenset[int], str] = {}
    with EvaluationJournal(key, journal / "held-out.json", losses) as evaluate:
        for removed in track([frozenset(), *sorted(sets, key=sorted)], "held-out perplexity"):
            try:
                found[removed] = evaluate(removed)
            except SimdiffError as error:  # such as a cut that stock classes cannot express
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
