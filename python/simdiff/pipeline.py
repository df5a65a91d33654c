"""The main job: calibrate, score, plan, prune, reload, evaluate, report."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.bootstrap import NUM_RESAMPLES, amounts_of_text, bootstrap_plan
from simdiff.budget import Budget
from simdiff.calibration import IN_MEMORY, Text, TokenWindows, token_windows
from simdiff.checkpoint import check_output, cut_checkpoint, files_of, write_cut, write_pruned
from simdiff.comparison import ComparisonOptions, compare, remove_journal
from simdiff.comparison_results import Comparison
from simdiff.criteria import DEFAULT_ALPHA, DEFAULT_CRITERION, check_criterion
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.evaluation import generate, perplexity
from simdiff.files import MARKER, check_new_path, header, new_directory, write_json
from simdiff.machine import describe_machine
from simdiff.model_card import write_card
from simdiff.models import check_same_model, find_decoder_layers, load_model, model_identity
from simdiff.planning import check_planning, make_plan
from simdiff.progress import step
from simdiff.report.comparison_page import write_comparison
from simdiff.report.page import write_report
from simdiff.scores import LayerScores
from simdiff.search_plans import SEARCHED, needs_model, search
from simdiff.selection import PruningPlan, check_selection
from simdiff.speed import measure_speed
from simdiff.stability import ScoringOptions, score_windows
from simdiff.surgery import removed_layers

PROMPT = "The history of the steam engine began"


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how much of it."""

    source: Text
    num_windows: int = 32
    window_length: int = 512
    seed: int = 0

    def windows(self, tokenizer: PreTrainedTokenizerBase, part: str) -> TokenWindows:
        """Token windows of one part of the text."""
        return token_windows(
            self.source,
            tokenizer,
            part=part,
            num_windows=self.num_windows,
            window_length=self.window_length,
            seed=self.seed,
        )


@dataclass(frozen=True)
class PlanOptions:
    """Which layers may go, and how many."""

    criterion: str = DEFAULT_CRITERION
    alpha: float = DEFAULT_ALPHA
    budget: Budget = field(default_factory=Budget)
    protect: Collection[int] = field(default_factory=tuple)
    selection: str | None = None
    max_blocks: int | None = None
    keep_decisive: bool = True
    random_seed: int = 0
    evaluation_windows: int = 4
    """Calibration windows that searches read, and those of the greedy search of which simdiff
    spends 1/50; 0 runs no search."""
    num_resamples: int = NUM_RESAMPLES
    """Of the calibration sequences, to tell how sure the plan is; 0 does not."""

    def count(self, model: Mapping[str, Any]) -> int:
        """How many layers go; refuses options that cannot be met, before any scoring.

        Args:
            model: of `model_identity`.
        """
        count = self.budget.layers(model)
        if self.criterion not in SEARCHED:
            check_criterion(self.criterion, self.alpha)
        check_planning(self.criterion, self.selection, self.max_blocks)
        check_selection(int(model["num_layers"]), count, self.protect)
        if self.num_resamples < 0:
            raise SimdiffError(f"bootstrap resamples must be 0 or more, got {self.num_resamples}")
        if self.evaluation_windows < 0:
            raise SimdiffError(
                f"evaluation windows must be 0 or more, got {self.evaluation_windows}"
            )
        if self.criterion in SEARCHED and self.evaluation_windows == 0:
            raise needs_model(self.criterion)
        return count

    def plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
        journal: Path | None = None,
    ) -> PruningPlan:
        """The plan for these scores, and how sure it is where scores alone give one.

        Args:
            scores: with `sequences`, unless the latter may remain unknown.
            model, windows: the dense model and its calibration windows; searches need them, see
                `make_plan` for the others.
            journal: keeps the finished evaluations of a search, see `simdiff.search_plans.search`.
        """
        if model is None or windows is None or self.evaluation_windows == 0:
            model = windows = None
        else:
            windows = windows[: self.evaluation_windows]
        if self.criterion in SEARCHED:
            if model is None or windows is None:
                raise needs_model(self.criterion)
            return search(
                model,
                scores,
                windows,
                self.criterion,
                self.count(scores.model),
                protect=self.protect,
                journal=journal,
            )
        plan = self.first_plan(scores, model, windows)
        notes = [] if scores.stability is None else [str(scores.stability["note"])]
        confidence = None
        if self.num_resamples:
            with step(f"{self.num_resamples} bootstrap resamples"):
                confidence = bootstrap_plan(
                    scores, self.first_plan, num_resamples=self.num_resamples
                )
            if confidence is None:
                few = scores.sequences is not None
                notes.append(
                    "no bootstrap: the scores must hold two sequences or more apart, got "
                    + ("one group" if few else "none; score the model again for that")
                )
            else:
                notes.append(confidence.note())
        return replace(plan, confidence=confidence, notes=(*plan.notes, *notes))

    def first_plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
    ) -> PruningPlan:
        """The plan alone; without a model, the one that scores alone give."""
        return make_plan(
            scores,
            self.count(scores.model),
            criterion=self.criterion,
            alpha=self.alpha,
            selection=self.selection,
            protect=self.protect,
            max_blocks=self.max_blocks,
            keep_decisive=self.keep_decisive,
            random_seed=self.random_seed,
            model=model,
            windows=windows,
        )


def calibrated(name: str, scores: LayerScores) -> tuple[PreTrainedModel, Tensor]:
    """The model that scores were made for, and the token windows they were made on.

    Raises:
        SimdiffError: another model, or a text that has changed or gone.
    """
    model, tokenizer = load_model(name, dtype=str(scores.model["dtype"]))
    check_same_model(model, scores.model, "file of scores")
    return model, calibration_windows(scores, tokenizer)


def calibration_windows(scores: LayerScores, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token windows that scores were made on, read again.

    Raises:
        SimdiffError: no text in their record, or one that has changed or gone.
    """
    text = scores.calibration
    if "source" not in text:
        raise SimdiffError("the scores must name their calibration text, got none in their record")
    if text["source"].startswith(IN_MEMORY):
        raise SimdiffError(
            f"the scores were made on {text['source']}, which cannot be read again: give their "
            "token windows (windows=), or score a text file"
        )
    windows = token_windows(
        text["source"],
        tokenizer,
        part=text["part"],
        num_windows=text["num_windows"],
        window_length=text["window_length"],
        seed=text["seed"],
    )
    text = {key: value for key, value in text.items() if key != "skip_leading"}
    if windows.identity.to_dict() != text:
        raise SimdiffError(
            f"text {text['source']}: must be as it was when the scores were made, {text}, "
            f"got {windows.identity.to_dict()}"
        )
    return windows.tokens


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    text: TextOptions,
    plan: PlanOptions,
    scoring: ScoringOptions | None = None,
    batch_size: int = 8,
) -> tuple[LayerScores, TokenWindows]:
    """The calibration pass of a model, and the windows that it read.

    Args:
        model, tokenizer, name: of the dense model.
        text: how many windows; those of the first check where more are read until `plan` is stable.
        plan: what has to be stable.
        scoring: what is skipped, and whether more text is read.
        batch_size: windows per forward.
    """
    scoring = scoring or ScoringOptions()
    scoring.check(text.num_windows, text.window_length)
    if scoring.until_stable:
        if plan.criterion in SEARCHED:
            raise SimdiffError(
                f"calibration until the plan is stable needs a criterion of scores, got "
                f"{plan.criterion}, which searches"
            )
        plan.count(model_identity(model, name))
    most = replace(text, num_windows=scoring.num_windows(text.num_windows))
    return score_windows(
        model,
        most.windows(tokenizer, "calibration"),
        scoring,
        plan.first_plan,
        first=text.num_windows,
        name=name,
        batch_size=batch_size,
        num_resamples=plan.num_resamples or NUM_RESAMPLES,
    )


@dataclass(frozen=True)
class RunOutcome:
    """What a run found; `directory` holds the same as files."""

    directory: Path
    scores: LayerScores
    plan: PruningPlan
    results: dict[str, Any]


def run(
    name: str,
    directory: Path,
    *,
    text: TextOptions,
    plan: PlanOptions,
    scoring: ScoringOptions | None = None,
    held_out_source: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
) -> RunOutcome:
    """Make a smaller model and prove what it is worth.

    Writes into `directory`: model/ (the pruned checkpoint), scores.json, plan.json, results.json,
    report.html, importance.png, metrics.png. They appear together, or not at all.

    Args:
        name: a local directory, a hub name, or "demo".
        directory: must not exist, unless `overwrite`.
        text: calibration text; its other half is held out for evaluation.
        plan: criterion and number of layers.
        scoring: what is skipped, and whether more text is read until the plan is stable.
        held_out_source: another text to evaluate on, whole.
        batch_size: windows per forward while scoring.
        dtype, device: see `simdiff.models.load_model`.
    """
    check_new_path(directory.absolute(), overwrite)
    if scoring is not None:
        scoring.check(text.num_windows, text.window_length)
    if Path(name, "config.json").is_file():
        check_output(Path(name), directory)
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    plan.count(model_identity(model, name))
    scores, calibration = calibrate(
        model, tokenizer, name, text=text, plan=plan, scoring=scoring, batch_size=batch_size
    )
    held_out = _held_out(text, tokenizer, held_out_source)
    journal = search_journal(directory)
    chosen = plan.plan(scores, model, calibration.tokens, journal)
    with new_directory(directory, overwrite) as scratch:
        scores.save(scratch / "scores.json")
        chosen.save(scratch / MARKER)
        (scratch / "model").mkdir()
        _write_model(name, dtype, model, tokenizer, chosen, scratch / "model")
        dense, pruned = _measure_dense(model, chosen, held_out)
        del model
        gc.collect()
        pruned |= _measure_pruned(scratch / "model", held_out, dtype, device)
        results = {
            **header("simdiff.results", 1),
            "machine": describe_machine(),
            "evaluation": held_out.identity.to_dict()
            | {"num_predicted_tokens": dense.pop("num_tokens")},
            "dense": dense,
            "pruned": pruned,
            "amounts_of_text": [
                asdict(amount) for amount in amounts_of_text(scores, plan.first_plan)
            ]
            if plan.num_resamples and plan.criterion not in SEARCHED
            else [],
        }
        write_json(scratch / "results.json", results)
        write_card(scratch / "model", chosen, name, scores, results)
        with step("write the report"):
            write_report(scratch, scores, chosen, results)
    journal.unlink(missing_ok=True)
    return RunOutcome(directory, scores, chosen, results)


def search_journal(output: Path) -> Path:
    """Where the evaluations of a search are kept until its output is written."""
    output = output.absolute()
    return output.with_name(output.name + ".search.json")


def _write_model(
    name: str,
    dtype: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    directory: Path,
) -> None:
    """From the model's own files where they can be cut, from memory otherwise."""
    source = files_of(name, dtype)
    try:
        cut = None if source is None else cut_checkpoint(source, plan)
    except SurgeryError:  # of what spans layers only a model in memory can be cut
        cut = None
    if cut is None:
        write_pruned(model, tokenizer, plan, directory)
    else:
        write_cut(cut, directory)


def _measure_dense(
    model: PreTrainedModel, plan: PruningPlan, held_out: TokenWindows
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quality of the dense model, and the speed of both, interleaved on the same weights."""
    quality = perplexity(model, held_out.tokens, description="perplexity, dense")
    speed = measure_speed(
        {
            "dense": lambda: contextlib.nullcontext(model),
            "pruned": lambda: removed_layers(model, plan.removed),
        },
        held_out.tokens[:1, :128],
    )
    dense = asdict(quality) | {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "speed": asdict(speed["dense"]),
    }
    return dense, {"speed": asdict(speed["pruned"])}


def _measure_pruned(
    directory: Path, held_out: TokenWindows, dtype: str, device: str | None
) -> dict[str, Any]:
    """Reload the checkpoint with stock classes and measure what it is."""
    model, tokenizer = load_model(
        str(directory), dtype=dtype, device=device, description="reload the pruned checkpoint"
    )
    quality = asdict(perplexity(model, held_out.tokens, description="perplexity, pruned"))
    del quality["num_tokens"]
    with step("generate"):
        sample = generate(model, tokenizer, PROMPT)
    return quality | {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "generation": asdict(sample),
    }


def run_comparison(
    name: str,
    directory: Path,
    *,
    text: TextOptions,
    options: ComparisonOptions,
    held_out_source: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> Comparison:
    """Compare criteria on one model, see `simdiff.comparison.compare`.

    Writes into `directory`: compare.html, compare.csv, compare.json, perplexity.png, layers.png,
    blocks.png, scores.json and plans/. What is finished before an interruption is kept beside it,
    in a directory of the same name that ends with .journal, and removed at the end.

    Args:
        name, directory, text, held_out_source, batch_size, dtype, device, overwrite: see `run`.
        options: what is compared.
        restart: forget what an interrupted comparison left.
    """
    directory = directory.absolute()
    check_new_path(directory, overwrite)
    journal = directory.with_name(directory.name + ".journal")
    if restart:
        remove_journal(journal)
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    options.counts(len(find_decoder_layers(model)))
    calibration, held_out = both_parts(text, tokenizer, held_out_source)
    comparison = compare(
        model, calibration, held_out, options, journal, name=name, batch_size=batch_size
    )
    with new_directory(directory, overwrite) as scratch:
        comparison.save(scratch)
        with step("write the report"):
            write_comparison(scratch, comparison)
    remove_journal(journal)
    return comparison


def both_parts(
    text: TextOptions, tokenizer: PreTrainedTokenizerBase, held_out_source: Text | None
) -> tuple[TokenWindows, TokenWindows]:
    """Calibration windows, and held-out ones from the other half or another text."""
    calibration = text.windows(tokenizer, "calibration")
    return calibration, _held_out(text, tokenizer, held_out_source)


def _held_out(
    text: TextOptions, tokenizer: PreTrainedTokenizerBase, source: Text | None
) -> TokenWindows:
    if source is None:
        return text.windows(tokenizer, "held-out")
    return replace(text, source=source).windows(tokenizer, "all")
