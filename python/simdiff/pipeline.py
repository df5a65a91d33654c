"""The main job: calibrate, score, plan, prune, reload, evaluate, report."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.calibration import TokenWindows, token_windows
from simdiff.checkpoint import check_output, cut_checkpoint, files_of, write_cut, write_pruned
from simdiff.criteria import DEFAULT_ALPHA, DEFAULT_CRITERION, check_criterion, importance
from simdiff.errors import SurgeryError
from simdiff.evaluation import generate, perplexity
from simdiff.files import MARKER, check_new_path, header, new_directory, write_json
from simdiff.machine import describe_machine
from simdiff.model_card import write_card
from simdiff.models import find_decoder_layers, load_model
from simdiff.progress import step
from simdiff.report.page import write_report
from simdiff.scores import LayerScores, score
from simdiff.selection import PruningPlan, check_selection, layers_for_ratio, select
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
    ratio: float | None = None
    num_layers: int | None = None
    protect: Collection[int] = field(default_factory=tuple)

    def count(self, num_layers: int) -> int:
        """How many layers go; refuses options that cannot be met, before any scoring."""
        count = self.num_layers
        if count is None:
            count = layers_for_ratio(num_layers, 0.25 if self.ratio is None else self.ratio)
        check_criterion(self.criterion, self.alpha)
        check_selection(num_layers, count, self.protect)
        return count

    def plan(self, scores: LayerScores) -> PruningPlan:
        """The plan for these scores."""
        count = self.count(scores.num_layers)
        return select(scores, importance(scores, self.criterion, self.alpha), count, self.protect)


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
    plan.count(len(find_decoder_layers(model)))
    calibration = text.windows(tokenizer, "calibration")
    if held_out_source is None:
        held_out = text.windows(tokenizer, "held-out")
    else:
        other = TextOptions(held_out_source, text.num_windows, text.window_length, text.seed)
        held_out = other.windows(tokenizer, "all")
    scores = score(
        model,
        calibration.batches(batch_size),
        name=name,
        calibration=calibration.identity.to_dict(),
    )
    chosen = plan.plan(scores)
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
