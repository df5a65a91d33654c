"""The Python functions `simdiff.score`, `plan`, `prune`, `evaluate` and `recover`.

They do what the commands of these names do.

A model is an object of transformers, or what the commands take: a directory, a hub name or "demo".
A text is what the commands take ("demo", a text file, a .jsonl file) or a list of documents; where
only tokens matter, token ids `(num_windows, window_length)` serve too. It may be left out for the
model "demo" alone, which then reads "demo".

Options are plain arguments, or objects that hold them all: `TextOptions` in place of a text,
`ScoringOptions` and `PlanOptions` as `options`. An option is given in one of the two ways.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.checkpoints.cut import DEFAULT_SHARD_SIZE
from simdiff.checkpoints.from_memory import write_pruned
from simdiff.data.documents import Text
from simdiff.data.text_options import TextOptions
from simdiff.errors import SimdiffError
from simdiff.evaluation.quality import Quality, Subject, TextChoice, evaluate_models
from simdiff.evaluation.tasks import TaskOptions
from simdiff.io.kinds import Kind
from simdiff.io.outputs import check_new_path, check_not_input, new_directory
from simdiff.io.trackers import logged
from simdiff.jobs.calibrate import calibration_windows
from simdiff.jobs.inputs import (
    Model,
    check_batch_size,
    is_demo,
    one_way,
    resolve,
    saved_tokenizer,
    text_of,
)
from simdiff.jobs.plans import Plan, fitted, plan_for, read_plan
from simdiff.jobs.prune import prune_checkpoint
from simdiff.jobs.recover import recover as recover_by_name
from simdiff.jobs.stability import ScoringOptions
from simdiff.jobs.tracking import options_told, recovery_tracked
from simdiff.models.identity import check_same_model
from simdiff.models.streamed import StreamOptions, chosen_stream
from simdiff.models.sweep import remove_states
from simdiff.planning.budget import Budget
from simdiff.planning.names import (
    DEFAULT_ALPHA,
    DEFAULT_CRITERION,
    NUM_RESAMPLES,
)
from simdiff.planning.options import PlanOptions
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import write_card
from simdiff.recovery.record import RecoveryRecord
from simdiff.scoring.calibration_pass import score as score_batches
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.scores import score_with_sublayers
from simdiff.surgery.layers import remove_layers


def score(
    model: Model,
    text: Text | TextOptions | Tensor | None = None,
    *,
    options: ScoringOptions | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_windows: int = 32,
    window_length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | bool | None = None,
    backend: str | None = None,
    sublayers: bool = False,
    skip_leading: int = 0,
    max_state_bytes: int | None = None,
    progress: bool = True,
) -> LayerScores:
    """Score every layer, and every block of layers, from the hidden states of calibration text.

    For a token with hidden state x before a layer and y after it: cosine distance 1 - cos(x, y),
    squared difference ||y - x||^2, absolute difference |y - x|_1 / hidden_size, relative
    difference ||y - x|| / ||x|| and both norms; means, standard errors and maxima over tokens.

    Args:
        model: an object, a directory, a hub name, or "demo".
        text: calibration text, of which one half is read and the other stays held out, or its
            `TextOptions`; or token ids `(num_windows, window_length)`, all of which are read.
        options: `sublayers`, `skip_leading` and `max_state_bytes` in one object, with the number of
            groups of sequences that are kept apart; `until_stable` is for the command alone.
        tokenizer: None takes the one saved beside the model.
        num_windows, window_length, seed: how much of the text, and its shuffle.
        batch_size: windows per forward.
        dtype, device: of a model that is loaded by name; see `simdiff.models.loading.load_model`.
        stream: True loads the layers of a model given by name one at a time, False loads it whole,
            None what fits; or `StreamOptions`, with a folder from which a killed call goes on.
        backend: of simdiff_kernels; None takes the fastest.
        sublayers: also score the attention and the MLP of every layer.
        skip_leading: so many first tokens of each window are kept apart; not with `sublayers`.
        max_state_bytes: most that the hidden states of one forward may take; fewer windows run at a
            time where they would take more. None: no limit.
        progress: show a bar.

    Raises:
        SimdiffError: no such model or text, or a text shorter than a window.
        simdiff_kernels.NonFiniteError: a hidden state held NaN or Inf.

    Source: SimDiff, arXiv 2604.19520, Equations 1 to 9.
    """
    if isinstance(text, Tensor) and (text.dim() != 2 or not len(text) or text.is_floating_point()):
        raise SimdiffError(
            f"score: text as token ids must be integers (num_windows, window_length), got "
            f"{text.dtype} of shape {tuple(text.shape)}"
        )
    plain = {
        "skip_leading": skip_leading,
        "sublayers": sublayers,
        "max_state_bytes": max_state_bytes,
    }
    chosen = one_way("score", options, ScoringOptions(), plain)
    if chosen.until_stable:
        raise SimdiffError(
            "score: until_stable is an option of `simdiff score` and `simdiff run` alone"
        )
    source = (
        text
        if isinstance(text, Tensor)
        else text_of(
            "score",
            model,
            text,
            {"num_windows": num_windows, "window_length": window_length, "seed": seed},
        )
    )
    length = source.shape[1] if isinstance(source, Tensor) else source.window_length
    chosen.check(num_windows, length)
    check_batch_size("score", batch_size)
    if not isinstance(source, Tensor):
        source.check()
    loaded, name, tokenizer = resolve(
        "score", model, tokenizer, dtype=dtype, device=device, stream=stream
    )
    if isinstance(source, Tensor):
        batches, record = list(source.split(batch_size)), {}
    else:
        windows = source.windows(tokenizer or saved_tokenizer(loaded), "calibration")
        batches, record = windows.batches(batch_size), windows.identity.to_dict()
    scores = (score_with_sublayers if chosen.sublayers else score_batches)(
        loaded,
        batches,
        name=name,
        calibration=record,
        backend=backend,
        progress=progress,
        groups=chosen.groups,
        skip_leading=chosen.skip_leading,
        max_state_bytes=chosen.max_state_bytes,
    )
    remove_states(loaded)
    return scores


def plan(
    scores: LayerScores | str | Path,
    num_layers: int | None = None,
    *,
    options: PlanOptions | None = None,
    ratio: float | None = None,
    parameter_ratio: float | None = None,
    speed_up: float | None = None,
    max_memory: float | None = None,
    criterion: str = DEFAULT_CRITERION,
    alpha: float = DEFAULT_ALPHA,
    selection: str | None = None,
    max_blocks: int | None = None,
    protect: Collection[int] = (),
    random_seed: int = 0,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    windows: Tensor | None = None,
    evaluation_windows: int = 4,
    effort: str | None = None,
    bootstrap: int = NUM_RESAMPLES,
    stream: StreamOptions | bool | None = None,
) -> PruningPlan:
    """Choose the layers that go.

    Args:
        scores: of `score`, or a scores.json.
        num_layers, ratio, parameter_ratio, speed_up, max_memory: how much goes: a number of layers,
            a share of the layers or of the parameters, or what decoding speed (a factor) or memory
            (GB of 1e9 bytes) is to be reached; at most one, and a quarter of the layers if none.
        options: all of what chooses the layers in one object, in place of the plain arguments.
        criterion, alpha, selection, max_blocks, random_seed: as the options of `simdiff plan`.
        protect: layers that stay, counted from 0.
        model: the model of the scores; `simdiff` then improves its plan by perplexity.
        tokenizer: of `model`; None takes the one saved beside it.
        windows: token ids `(num_windows, window_length)` that this reads; None takes the windows
            that calibrated, if their text can be read again.
        evaluation_windows: that searches read, and of the greedy search of whose cost `simdiff`
            spends a share.
        effort: what `simdiff` spends on its plan with a model: "none", "quick" (1/50 of greedy
            search by perplexity), "normal" (a fifth; the default unless the model is streamed) or
            "thorough" (as much).
        stream: how `model` is loaded, see `score`.
        bootstrap: draws of the calibration windows that tell how sure the plan is; 0 is none.

    Raises:
        SimdiffError: a budget that cannot be met, unknown names, scores that lack what the
            criterion needs, scores of another model.
    """
    if not isinstance(scores, LayerScores):
        scores = LayerScores.load(Path(scores))
    plain = {
        "criterion": criterion,
        "alpha": alpha,
        "budget": Budget(num_layers, ratio, parameter_ratio, speed_up, max_memory),
        "protect": tuple(protect),
        "selection": selection,
        "max_blocks": max_blocks,
        "random_seed": random_seed,
        "evaluation_windows": evaluation_windows,
        "effort": effort,
        "bootstrap": bootstrap,
    }
    chosen = one_way("plan", options, PlanOptions(), plain)
    if model is None:
        if chosen.effort is not None:
            raise SimdiffError("plan: effort has an effect only with model=...")
        return chosen.plan(scores)
    loaded, _, tokenizer = resolve(
        "plan", model, tokenizer, dtype=str(scores.model["dtype"]), stream=stream
    )
    check_same_model(loaded, scores.model, "file of scores")
    if windows is None:
        windows = calibration_windows(scores, tokenizer or saved_tokenizer(loaded))
    found = chosen.plan(scores, loaded, windows)
    remove_states(loaded)
    return found


@overload
def prune(model: Model, plan: Plan, output: None = None) -> PreTrainedModel: ...


@overload
def prune(
    model: Model,
    plan: Plan,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Path: ...


def prune(
    model: Model,
    plan: Plan,
    output: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> PreTrainedModel | Path:
    """Take the layers of a plan out: in memory, or into a checkpoint that transformers loads.

    Args:
        model: an object, a directory, a hub name, or "demo".
        plan: of `plan`, or a plan.json, made for this model or one with layers of the same shapes;
            or the layers themselves, such as [2, 3], counted from 0.
        output: None removes the layers from the model in memory, in place, and returns it. A path
            writes a new directory, whole or not at all, and leaves the model as it is; the files
            of a model given by name are cut without its weights in memory.
        tokenizer: saved with a model given as an object; None takes the one saved beside it.
        dtype: of the weights that are written; "auto" is as they are.
        device: where a model is loaded if the dtype differs from the stored one.
        max_shard_size: largest weight file, in bytes or such as "5GB".
        overwrite: replace an earlier output.

    Raises:
        SimdiffError: a plan for another model, a path that exists, a damaged checkpoint.
        SurgeryError: stock classes cannot express the cut.
    """
    given = [Path(plan)] if isinstance(plan, (str, Path)) else []
    plan = read_plan(plan)
    if output is None:
        loaded, name, _ = resolve("prune", model, tokenizer, dtype=dtype, device=device)
        plan = fitted(plan, loaded, name)
        check_same_model(loaded, plan.model, "plan")
        return remove_layers(loaded, plan.removed)
    directory = Path(output).absolute()
    check_not_input(directory, given)
    check_new_path(directory, overwrite, Kind.MODEL)
    if not isinstance(model, (str, Path)):
        loaded, name, _ = resolve("prune", model, None)
        if tokenizer is None:
            tokenizer = saved_tokenizer(loaded, required=False)
        plan = fitted(plan, loaded, name)
        with new_directory(directory, overwrite, Kind.MODEL) as scratch:
            write_pruned(loaded, tokenizer, plan, scratch, max_shard_size=max_shard_size)
            write_card(scratch, plan, name)
        return directory
    prune_checkpoint(
        str(model),
        plan_for(str(model), plan),
        directory,
        dtype=dtype,
        device=device,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    return directory


def evaluate(
    models: Model | Sequence[Model],
    text: Text | TextOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    part: str = "held-out",
    num_windows: int = 32,
    window_length: int = 512,
    stride: int | None = None,
    seed: int = 0,
    tasks: TaskOptions | Sequence[str] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | bool | None = None,
) -> Quality:
    """Perplexity and accuracy of one or several models, the first taken as the dense one.

    Args:
        models: objects, directories, hub names, or "demo".
        text: for perplexity, exp(mean negative log-likelihood per predicted token), or its
            `TextOptions`; None measures none where there are tasks. Half of it is held out from
            `score` with the same seed.
        tokenizer: of models given as objects; None takes the ones saved beside them.
        part: "held-out", "calibration" or "all" of the text.
        num_windows: of the text, 0 for all of it.
        window_length, stride: tokens in a window, and from the start of one to the next; None is
            no overlap.
        seed: of the shuffle of documents.
        tasks: of lm_eval, by name or with their options; needs simdiff-kernels[eval].
        dtype, device, stream: of models given by name, see `score`.

    Raises:
        SimdiffError: no such model, text or task; a text shorter than a window; NaN or Inf.
    """
    several = list(models) if isinstance(models, (list, tuple)) else [models]
    amount = {"num_windows": num_windows, "window_length": window_length, "seed": seed}
    source = None
    if text is not None or (tasks is None and any(map(is_demo, several[:1]))):
        source = text_of("evaluate", several[0] if several else "", text, amount)
    elif tasks is None:
        raise SimdiffError("evaluate: text, tasks or both must be given, got neither")
    subjects: list[str | Path | Subject] = []
    for index, model in enumerate(several):
        if isinstance(model, (str, Path)):
            subjects.append(model)
        else:
            loaded, name, _ = resolve("evaluate", model, None)
            name = f"{name or type(loaded).__name__}, in memory"
            name += f" ({index})" if len(several) > 1 else ""
            subjects.append(Subject.given(loaded, tokenizer or saved_tokenizer(loaded), name))
    choice = None
    if source is not None:
        choice = TextChoice(
            source.source, source.num_windows, source.window_length, stride, part, source.seed
        )
    if isinstance(tasks, str):  # a sequence too, of letters
        tasks = [tasks]
    options = (
        tasks if tasks is None or isinstance(tasks, TaskOptions) else TaskOptions(tuple(tasks))
    )
    return evaluate_models(
        subjects,
        text=choice,
        tasks=options,
        dtype=dtype,
        device=device,
        stream=chosen_stream(stream),
    )


def recover(
    model: Model,
    plan: Plan,
    output: str | Path,
    text: Text | TextOptions | None = None,
    *,
    method: str = "closed-form",
    choose: int | None = None,
    held_out: Text | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_windows: int = 80,
    window_length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | bool | None = None,
    overwrite: bool = False,
    restart: bool = False,
    log: Sequence[str] = (),
    **options: Any,
) -> RecoveryRecord:
    """Cut a model by a plan, repair the layers that stay, and write a stock checkpoint.

    Args:
        model: the dense model: an object, a directory, a hub name, or "demo".
        plan: of `plan`, or a plan.json, made for this model or one with layers of the same shapes;
            or the layers themselves, such as [2, 3], counted from 0.
        output: a new directory; it appears whole or not at all.
        text: one half of it is what the method sees, the other measures what it brought; or its
            `TextOptions`.
        method: a name in `simdiff.recovery.methods.METHODS`: "closed-form" (linear maps by
            ridge regression, nothing trained), "lora", "distillation" or "partial" (the last
            layers themselves).
        choose: repair so many of the plans that the search of `plan` evaluated, and take the one of
            lowest loss after that.
        held_out: another text to measure on, whole.
        tokenizer: of a model given as an object; None takes the one saved beside it.
        num_windows, window_length, seed: how much of the text, and its shuffle.
        batch_size: windows per forward.
        dtype, device, stream: of a model given by name, see `score`.
        overwrite: replace an earlier output.
        restart: forget what an interrupted training left.
        log: trackers that get losses, plan and quality, such as "trackio"; none unless asked.
        options: of the method, by the names of the options of `simdiff recover`, with underscores.

    Returns:
        What was done and what it brought: `perplexity("dense")`, `("pruned")`, `("recovered")`.

    Raises:
        SimdiffError: options, plan, model or text that cannot be used; NaN or Inf.
        SurgeryError: stock classes cannot express the cut.
    """
    amount = {"num_windows": num_windows, "window_length": window_length, "seed": seed}
    source = text_of("recover", model, text, amount, num_windows=80)
    files = (value for value in (plan, source.source, held_out) if isinstance(value, (str, Path)))
    check_not_input(Path(output), map(Path, files))
    plan = read_plan(plan)
    loaded, name = None, str(model)
    if not isinstance(model, (str, Path)):
        given, name, _ = resolve("recover", model, None)
        loaded = given, tokenizer or saved_tokenizer(given)
    elif tokenizer is not None:
        raise SimdiffError("recover: a tokenizer goes with a model given as an object")
    told = options_told("recover", name, source, {"method": method, **options})
    with logged(log, Path(output), told) as trackers:
        record = recover_by_name(
            name,
            Path(output),
            plan=plan,
            method=method,
            choose=choose,
            text=source,
            held_out_source=held_out,
            options=options,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            stream=chosen_stream(stream),
            overwrite=overwrite,
            restart=restart,
            loaded=loaded,
            told=trackers.metrics,
        )
        recovery_tracked(trackers, record, Path(output))
        return record
