"""The main job: calibrate, score, plan, prune, reload, evaluate, report."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.checkpoints.cut import check_output, cut_checkpoint, files_of, write_cut
from simdiff.checkpoints.from_memory import origin, write_pruned
from simdiff.data.text import TokenWindows
from simdiff.data.text_options import TextOptions, held_out_windows
from simdiff.errors import SurgeryError
from simdiff.evaluation.generation import generate
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.io import ranks
from simdiff.io.json_files import header, write_json
from simdiff.io.kinds import PLAN_FILE, RESULTS_FILE, Kind
from simdiff.io.machine import describe_machine
from simdiff.io.outputs import check_new_path, new_directory, write_config
from simdiff.io.progress import step, tell
from simdiff.io.trackers import Log, logged
from simdiff.jobs.calibrate import calibrate
from simdiff.jobs.room import check_room
from simdiff.jobs.stability import ScoringOptions
from simdiff.jobs.tracking import options_told, run_tracked
from simdiff.models.identity import model_identity
from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions, stream_of
from simdiff.models.sweep import offload_folder, refuse_streamed, remove_states
from simdiff.models.windows import check_windows
from simdiff.planning.bootstrap import amounts_of_text
from simdiff.planning.names import SEARCHED
from simdiff.planning.options import PlanOptions, search_journal
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import write_card
from simdiff.report.page import write_report
from simdiff.scoring.scores import LayerScores
from simdiff.speed.run_speed import SPEED_ROUNDS, measure_speed
from simdiff.surgery.copies import sharing_copy

PROMPT = "The history of the steam engine began"


@dataclass(frozen=True)
class RunOutcome:
    """What a run found; `directory` holds the same as files."""

    directory: Path
    scores: LayerScores
    plan: PruningPlan
    results: dict[str, Any]


def run(
    name: str,
    directory: str | Path,
    *,
    text: TextOptions,
    plan: PlanOptions,
    scoring: ScoringOptions | None = None,
    held_out_source: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | None = None,
    overwrite: bool = False,
    speed_rounds: int = SPEED_ROUNDS,
    config: str | None = None,
    log: Log | Sequence[str] = (),
) -> RunOutcome:
    """Make a smaller model and prove what it is worth.

    Writes into `directory`: model/ (the pruned checkpoint), scores.json, plan.json, results.json,
    report.html. They appear together, or not at all.

    Args:
        name: a local directory, a hub name, or "demo".
        directory: must not exist, unless `overwrite`.
        text: calibration text; its other half is held out for evaluation.
        plan: criterion and number of layers.
        scoring: what is skipped, and whether more text is read until the plan is stable.
        held_out_source: another text to evaluate on, whole.
        batch_size: windows per forward while scoring.
        dtype, device: see `simdiff.models.loading.load_model`.
        stream: see there; speed is not measured, and nothing generated, where it is streamed.
        overwrite: replace an earlier run.
        speed_rounds: timed rounds of the speed test; 0 measures no speed.
        config: content of the config.yaml that repeats this; None writes none.
        log: trackers that get plan, tables, numbers and report, such as "trackio".
    """
    directory = Path(directory)
    check_new_path(directory.absolute(), overwrite, Kind.RUN)
    if scoring is not None:
        scoring.check(text.num_windows, text.window_length)
    if Path(name, "config.json").is_file():
        check_output(Path(name), directory)
    text.check(held_out_source)
    told = options_told("run", name, text, asdict(plan))
    with logged(log, directory, told) as trackers:
        model, tokenizer = load_model(name, dtype=dtype, device=device, stream=stream)
        streamed = stream if stream_of(model) is not None else None
        num_remove = plan.count(model_identity(model, name))
        ranks.first(partial(check_room, directory, model, num_remove))
        held_out = held_out_windows(text, tokenizer, held_out_source)  # before anything is run
        check_windows(model, [held_out.tokens], "run")
        scores, calibration = calibrate(
            model, tokenizer, name, text=text, plan=plan, scoring=scoring, batch_size=batch_size
        )
        journal = search_journal(directory)
        chosen = plan.plan(scores, model, calibration.tokens, journal)
        with new_directory(directory, overwrite, Kind.RUN) as scratch:
            write_config(scratch, config)
            scores.save(scratch / "scores.json")
            chosen.save(scratch / PLAN_FILE)
            ranks.first(
                partial(_write_model, name, dtype, model, tokenizer, chosen, scratch / "model")
            )
            dense, pruned = _measure_dense(model, chosen, held_out, speed_rounds)
            states = offload_folder(model)
            del model
            gc.collect()
            pruned |= _measure_pruned(scratch / "model", held_out, dtype, device, streamed)
            results = {
                **header("simdiff.results"),
                "machine": describe_machine(),
                **({"streamed": True} if streamed else {}),
                "num_layers": scores.num_layers,
                "removed": list(chosen.removed),
                "evaluation": held_out.identity.to_dict()
                | {"num_predicted_tokens": dense.pop("num_tokens")},
                "dense": dense,
                "pruned": pruned,
                "amounts_of_text": [
                    asdict(amount) for amount in amounts_of_text(scores, plan.of_scores)
                ]
                if plan.bootstrap and plan.criterion not in SEARCHED
                else [],
            }
            write_json(scratch / RESULTS_FILE, results)
            ranks.first(lambda: _write_words(scratch, name, scores, chosen, results))
        ranks.first(lambda: journal.unlink(missing_ok=True))
        if states is not None:
            states.remove()
        outcome = RunOutcome(directory, scores, chosen, results)
        run_tracked(trackers, outcome)
        return outcome


def _write_model(
    name: str,
    dtype: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    directory: Path,
) -> None:
    """From the model's own files where they can be cut, from memory otherwise."""
    directory.mkdir()
    source = files_of(name, dtype)
    try:
        cut = None if source is None else cut_checkpoint(source, plan)
    except SurgeryError:  # of what spans layers only a model in memory can be cut
        cut = None
    if cut is None:
        refuse_streamed(
            model, "a cut of more than whole layers' files", "prune it on a machine that holds it"
        )
        write_pruned(model, tokenizer, plan, directory, source=origin(name, fetch=True))
    else:
        write_cut(cut, directory)


def _write_words(
    directory: Path,
    name: str,
    scores: LayerScores,
    plan: PruningPlan,
    results: dict[str, Any],
) -> None:
    """The model card and the report."""
    write_card(directory / "model", plan, name, scores, results)
    with step("write the report"):
        write_report(directory, scores, plan, results)


def _measure_dense(
    model: PreTrainedModel, plan: PruningPlan, held_out: TokenWindows, speed_rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quality of the dense model, and the speed of both, interleaved on the same weights.

    A streamed model has no speed to compare: it waits for its files.
    """
    quality = perplexity(model, held_out.tokens, description="perplexity, dense")
    dense = asdict(quality) | {"num_parameters": sum(p.numel() for p in model.parameters())}
    if stream_of(model) is not None:
        tell("Note: no speed is measured and nothing generated, since the model is streamed")
        return dense, {}
    if not speed_rounds:
        return dense, {}
    speed = ranks.first(
        lambda: measure_speed(
            model,
            sharing_copy(model, plan.removed),
            prompt_length=min(128, held_out.tokens.shape[1]),
            repeats=speed_rounds,
        )
    )
    return dense | {"speed": asdict(speed["dense"])}, {"speed": asdict(speed["pruned"])}


def _measure_pruned(
    directory: Path,
    held_out: TokenWindows,
    dtype: str,
    device: str | None,
    stream: StreamOptions | None,
) -> dict[str, Any]:
    """Reload the checkpoint with stock classes and measure what it is."""
    if stream is not None:  # as the dense model is, whose states lie elsewhere
        stream = replace(stream, always=True, folder=directory.with_name("states"))
    model, tokenizer = load_model(
        str(directory),
        dtype=dtype,
        device=device,
        description="reload the pruned checkpoint",
        stream=stream,
    )
    quality = asdict(perplexity(model, held_out.tokens, description="perplexity, pruned"))
    del quality["num_tokens"]
    quality["num_parameters"] = sum(p.numel() for p in model.parameters())
    if stream is not None:
        remove_states(model)
        return quality
    with step("generate"):
        sample = ranks.first(lambda: generate(model, tokenizer, PROMPT))
    return quality | {"generation": asdict(sample)}
