"""The job of `simdiff recover`: cut, repair, measure, write a stock checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.checkpoints.cut import (
    CheckpointCut,
    check_output,
    cut_checkpoint,
    files_of,
    write_cut,
)
from simdiff.checkpoints.from_memory import origin, write_model
from simdiff.data.documents import Text
from simdiff.data.text import TokenWindows
from simdiff.data.text_options import TextOptions, both_parts
from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import losses_of_plans
from simdiff.evaluation.window_perplexity import perplexity, perplexity_of
from simdiff.io.kinds import Kind
from simdiff.io.machine import describe_machine
from simdiff.io.outputs import check_new_path, new_directory, write_config
from simdiff.io.progress import step
from simdiff.io.safetensors_header import StoredTensor
from simdiff.jobs.plans import check_depth, fitted
from simdiff.jobs.room import check_room
from simdiff.models.config import quantization
from simdiff.models.identity import check_same_model, model_identity
from simdiff.models.loading import load_config, load_model
from simdiff.models.running import in_evaluation
from simdiff.models.streamed import StreamOptions, stream_of
from simdiff.models.sweep import WHOLE, Plan, refuse_streamed, remove_states
from simdiff.models.windows import check_windows
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import write_card
from simdiff.recovery.closed_form.streamed import recover_streamed
from simdiff.recovery.methods import RecoveryContext, RecoveryOutcome, check_options
from simdiff.recovery.plan_choice import choose_repaired, plans_to_try
from simdiff.recovery.record import RECORD, RecoveryRecord, changed_parameters, worse_notes
from simdiff.recovery.training.losses import LossLog, Told
from simdiff.recovery.training.state import remove_state
from simdiff.report.page import write_recovery
from simdiff.surgery.copies import sharing_copy
from simdiff.surgery.layers import layers_removed


def recover(
    name: str,
    directory: Path,
    *,
    plan: PruningPlan,
    method: str,
    text: TextOptions,
    choose: int | None = None,
    held_out_source: Text | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | None = None,
    overwrite: bool = False,
    restart: bool = False,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    config: str | None = None,
    told: Told | None = None,
) -> RecoveryRecord:
    """Cut a model, repair what stays, and write the result as a stock checkpoint.

    `directory` appears whole or not at all: weights, tokenizer, plan.json, recovery.json, the
    model card and a page (report.html). Perplexity of the dense, the plainly cut and the recovered
    model is measured on held-out text; a result that is worse than the plain cut says so in its
    notes and its card.

    Args:
        name: the dense model: a local directory, a hub name, or "demo".
        directory: must not exist, unless `overwrite`.
        plan: made for this model.
        method: a name in `METHODS`.
        text: its calibration half is what the method sees, its other half is held out.
        choose: repair so many plans of the search that made this one, and take the best; see
            `choose_repaired`.
        held_out_source: another text to evaluate on, whole.
        options: of the method, by name.
        batch_size: windows per forward.
        dtype, device, stream: see `simdiff.models.loading.load_model`.
        restart: forget what an interrupted training left.
        loaded: the model and its tokenizer, where they are in memory already.
        config: content of the config.yaml that repeats this; None writes none.
        told: takes the losses of a training as it goes; they are in `directory`.losses.jsonl too.

    What training needs to go on after an interruption is kept beside the output, in a directory of
    the same name that ends with .training, and removed at the end.

    Raises:
        SimdiffError: options, plan, model or text that cannot be used; NaN or Inf.
        SurgeryError: stock classes cannot express the cut.
    """
    options = dict(options or {})
    check_options(method, options)
    check_batch_size(batch_size)
    if choose is not None:
        plans_to_try(plan, choose)
    check_new_path(directory.absolute(), overwrite, Kind.MODEL)
    if Path(name, "config.json").is_file():
        check_output(Path(name), directory)
    if loaded is None:
        check_depth(plan, name)
    text.check(held_out_source)
    training = directory.absolute().with_name(directory.name + ".training")
    if restart:
        remove_state(training)
    stream = _with_folder(stream, directory)
    model, tokenizer = loaded or load_model(name, dtype=dtype, device=device, stream=stream)
    plan = fitted(plan, model, name)
    check_same_model(model, plan.model, "plan")
    check_recoverable(model)
    check_room(directory, model, len(plan.removed))
    identity = model_identity(model, name)
    if choose is not None:
        refuse_streamed(model, "choose", "a streamed model takes the plan as it is")
    cut = None if stream_of(model) is None else _cut_of_files(name, model, plan, method)
    calibration, held_out = both_parts(text, tokenizer, held_out_source)
    tried: list[dict[str, Any]] = []
    if choose is not None:
        plan, tried = choose_repaired(model, plan, calibration.tokens, choose, batch_size)
    losses = LossLog(training.with_name(directory.name + ".losses.jsonl"), told)
    context = RecoveryContext(tokenizer, calibration.identity.to_dict(), training, losses)
    finished = partial(new_directory, directory, overwrite, Kind.MODEL, finished=True)
    with contextlib.ExitStack() as stack:
        if cut is None:
            pruned, record = recovered(
                model,
                plan,
                calibration,
                held_out,
                method=method,
                options=options,
                batch_size=batch_size,
                context=context,
            )
            record = replace(record, model=identity)
            if tried:
                record = replace(record, details=record.details | {"plans": tried})
            scratch = stack.enter_context(finished())
            write_recovered(pruned, tokenizer, plan, record, scratch, name)
        else:
            record = recovered_streamed(
                model, plan, calibration, held_out, options=options, batch_size=batch_size
            )
            record = replace(record, model=identity)
            scratch = stack.enter_context(finished())
            write_cut(cut.with_tensors(_replaced(model)), scratch)
            _write_words(record, plan, scratch, name)
        write_config(scratch, config)
    remove_states(model)
    with contextlib.suppress(SimdiffError):  # somebody else's files in it stay
        remove_state(training)
    return record


def _with_folder(stream: StreamOptions | None, directory: Path) -> StreamOptions | None:
    """With the folder beside the output, where none is named: corrected weights lie in it."""
    if stream is None or stream.folder is not None:
        return stream
    folder = directory.absolute().with_name(directory.name + ".states")
    return replace(stream, folder=folder)


def _cut_of_files(
    name: str, model: PreTrainedModel, plan: PruningPlan, method: str
) -> CheckpointCut:
    """What a plan makes of a streamed model's files.

    Raises:
        SimdiffError: a method that trains, or weights that are to be written in another dtype.
    """
    if method != "closed-form":
        refuse_streamed(model, f"method {method}", "closed-form recovers a streamed one")
    source = files_of(name, "auto")
    assert source is not None  # it was streamed from there
    stored = load_config(source).dtype
    if stored is not None and model.dtype != stored:
        raise SimdiffError(
            f"a streamed model is written as it is stored, in {stored}, got dtype {model.dtype}: "
            "give dtype=auto"
        )
    return cut_checkpoint(source, plan)


def _replaced(model: PreTrainedModel) -> dict[str, StoredTensor]:
    stream = stream_of(model)
    assert stream is not None
    return stream.replaced


def check_batch_size(batch_size: int) -> None:
    """Refuse batches of nothing."""
    if batch_size < 1:
        raise SimdiffError(f"batch_size must be at least 1, got {batch_size}")


def check_recoverable(model: PreTrainedModel) -> None:
    """Refuse weights that cannot be changed as they are stored.

    Raises:
        SimdiffError: a quantised model.
    """
    if quantization(model.config) is not None or getattr(model, "is_quantized", False):
        raise SimdiffError(
            "recovery needs weights in floating point, got a quantised model: recover the "
            "unquantised model and quantise the result"
        )


@in_evaluation
def recovered(
    model: PreTrainedModel,
    plan: PruningPlan,
    calibration: TokenWindows,
    held_out: TokenWindows,
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    context: RecoveryContext | None = None,
) -> tuple[PreTrainedModel, RecoveryRecord]:
    """The pruned and repaired model, in memory, and the record of what was done.

    The dense model stays as it is; parameters that were not changed are shared with it.

    Args:
        model: the dense model.
        plan, method, options, batch_size: see `recover`.
        calibration: what the method sees.
        held_out: what all three models are measured on.
        context: tokenizer and a directory, see `RecoveryContext`; None gives the method the tokens
            alone and keeps nothing of an interrupted training.
    """
    options = dict(options or {})
    function = check_options(method, options).function()
    check_windows(model, [calibration.tokens, held_out.tokens], "recover")
    pruned = sharing_copy(model, plan.removed)
    quality = {
        "dense": _quality(model, held_out.tokens, "dense"),
        "pruned": _quality(pruned, held_out.tokens, "plain cut"),
    }
    start = time.monotonic()
    context = context or RecoveryContext(text=calibration.identity.to_dict())
    outcome = function(
        model,
        plan,
        calibration.tokens,
        pruned=pruned,
        options=options,
        batch_size=batch_size,
        context=context,
    )
    seconds = time.monotonic() - start
    pruned.eval()
    with layers_removed(model, plan.removed):
        changed = changed_parameters(pruned, model)
    quality["recovered"] = _quality(pruned, held_out.tokens, "recovered")
    texts = calibration, held_out
    return pruned, _record(method, outcome, changed, texts, quality, seconds, batch_size)


@in_evaluation
def recovered_streamed(
    model: PreTrainedModel,
    plan: PruningPlan,
    calibration: TokenWindows,
    held_out: TokenWindows,
    *,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> RecoveryRecord:
    """`recovered` in closed form of a streamed model, which reads what was changed afterwards.

    One pass over the weights measures the dense model and the plain cut, one corrects, and one over
    the layers that stay measures the result.
    """
    method = "closed-form"
    check_options(method, options or {})
    check_windows(model, [calibration.tokens, held_out.tokens], "recover")
    windows, removed = held_out.tokens, frozenset(plan.removed)

    def quality_of(plans: Sequence[Plan], what: str) -> list[dict[str, Any]]:
        losses = losses_of_plans(model, windows, plans, f"perplexity, {what}")
        return [asdict(perplexity_of(losses[plan], windows)) for plan in plans]

    dense, pruned = quality_of([WHOLE, removed], "dense and cut")
    start = time.monotonic()
    outcome, changed = recover_streamed(
        model, plan, calibration.tokens, options=options or {}, batch_size=batch_size
    )
    seconds = time.monotonic() - start
    (repaired,) = quality_of([removed], "recovered")
    quality = {"dense": dense, "pruned": pruned, "recovered": repaired}
    texts = calibration, held_out
    return _record(method, outcome, changed, texts, quality, seconds, batch_size)


def _record(
    method: str,
    outcome: RecoveryOutcome,
    changed: dict[str, str],
    texts: tuple[TokenWindows, TokenWindows],
    quality: dict[str, dict[str, Any]],
    seconds: float,
    batch_size: int,
) -> RecoveryRecord:
    calibration, held_out = texts
    return RecoveryRecord(
        method=method,
        formula=outcome.formula,
        trained=outcome.trained,
        settings=outcome.settings | {"batch_size": batch_size},
        changed=changed,
        calibration=calibration.identity.to_dict(),
        evaluation=held_out.identity.to_dict(),
        quality=quality,
        seconds=seconds,
        machine=describe_machine(),
        details=outcome.details,
        notes=outcome.notes + worse_notes(quality),
    )


def _quality(model: PreTrainedModel, windows: Tensor, what: str) -> dict[str, Any]:
    return asdict(perplexity(model, windows, description=f"perplexity, {what}"))


def write_recovered(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    record: RecoveryRecord,
    directory: Path,
    source: str,
) -> None:
    """Write a recovered model into an empty directory; see `simdiff.io.outputs.new_directory`."""
    with step("write the recovered checkpoint"):
        write_model(pruned, tokenizer, plan, directory, origin(source, fetch=True))
        _write_words(record, plan, directory, source)


def _write_words(record: RecoveryRecord, plan: PruningPlan, directory: Path, source: str) -> None:
    record.save(directory / RECORD)
    write_card(directory, plan, source, recovery=record)
    write_recovery(directory)
