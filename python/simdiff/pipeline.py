"""The main job: calibrate, score, plan, prune, reload, evaluate, report."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.budget import Budget
from simdiff.calibration import TokenWindows, token_windows
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
from simdiff.scores import LayerScores, score
from simdiff.selection import PruningPlan, check_selection
from simdiff.speed import measure_speed
from simdiff.surgery import removed_layers

PROMPT = "The history of the steam engine began"


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how much of it."""

    source: str
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
    """Calibration windows of the greedy search of which a run spends 1/50; 0 runs no search."""

    def count(self, model: Mapping[str, Any]) -> int:
        """How many layers go; refuses options that cannot be met, before any scoring.

        Args:
            model: of `model_identity`.
        """
        count = self.budget.layers(model)
        check_criterion(self.criterion, self.alpha)
        check_planning(self.criterion, self.selection, self.max_blocks)
        check_selection(int(model["num_layers"]), count, self.protect)
        if self.evaluation_windows < 0:
            raise SimdiffError(
                f"evaluation windows must be 0 or more, got {self.evaluation_windows}"
            )
        return count

    def plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
    ) -> PruningPlan:
        """The plan for these scores; see `make_plan` for what model and windows are used for."""
        if model is None or windows is None or self.evaluation_windows == 0:
            model = windows = None
        else:
            windows = windows[: self.evaluation_windows]
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
    text = scores.calibration
    if "source" not in text:
        raise SimdiffError("the scores must name their calibration text, got none in their record")
    model, tokenizer = load_model(name, dtype=str(scores.model["dtype"]))
    check_same_model(model, scores.model, "file of scores")
    windows = token_windows(
        text["source"],
        tokenizer,
        part=text["part"],
        num_windows=text["num_windows"],
        window_length=text["window_length"],
        seed=text["seed"],
    )
    if windows.identity.to_dict() != text:
        raise SimdiffError(
            f"text {text['source']}: must be as it was when the scores were made, {text}, "
            f"got {windows.identity.to_dict()}"
        )
    return model, windows.tokens


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
        held_out_source: another text to evaluate on, whole.
        batch_size: windows per forward while scoring.
        dtype, device: see `simdiff.models.load_model`.
    """
    check_new_path(directory.absolute(), overwrite)
    if Path(name, "config.json").is_file():
        check_output(Path(name), directory)
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    plan.count(model_identity(model, name))
    calibration, held_out = both_parts(text, tokenizer, held_out_source)
    scores = score(
        model,
        calibration.batches(batch_size),
        name=name,
        calibration=calibration.identity.to_dict(),
    )
    chosen = plan.plan(scores, model, calibration.tokens)
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
        }
        write_json(scratch / "results.json", results)
        write_card(scratch / "model", chosen, name, scores, results)
        with step("write the report"):
            write_report(scratch, scores, chosen, results)
    return RunOutcome(directory, scores, chosen, results)


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
    text: TextOptions, tokenizer: PreTrainedTokenizerBase, held_out_source: str | None
) -> tuple[TokenWindows, TokenWindows]:
    """Calibration windows, and held-out ones from the other half or another text."""
    calibration = text.windows(tokenizer, "calibration")
    if held_out_source is None:
        return calibration, text.windows(tokenizer, "held-out")
    other = TextOptions(held_out_source, text.num_windows, text.window_length, text.seed)
    return calibration, other.windows(tokenizer, "all")


def evaluate(
    names: list[str], *, text: TextOptions, part: str, dtype: str, device: str | None
) -> dict[str, Any]:
    """Perplexity of several models on the same text, one after the other."""
    results: dict[str, Any] = {}
    for name in names:
        model, tokenizer = load_model(name, dtype=dtype, device=device)
        windows = text.windows(tokenizer, part)
        quality = perplexity(model, windows.tokens, description=f"perplexity, {name}")
        results[name] = asdict(quality) | {"evaluation": windows.identity.to_dict()}
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {**header("simdiff.evaluation", 1), "models": results}
