"""The methods of `simdiff recover` that train: `lora`, `distillation` and `partial`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.documents import IN_MEMORY, Text, check_text
from simdiff.data.records import source_of_record
from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import evaluation_key
from simdiff.io.json_files import check_key
from simdiff.io.outputs import write_bytes
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.closed_form import method as closed_form
from simdiff.recovery.methods import Recover, RecoveryContext, RecoveryOutcome
from simdiff.recovery.training.data import (
    Examples,
    cut_windows,
    read_instructions,
    training_examples,
)
from simdiff.recovery.training.last_layers import LEAST
from simdiff.recovery.training.loop import FineTuning, fine_tune
from simdiff.recovery.training.lora import require_peft
from simdiff.recovery.training.option_table import STARTS, TRAINING_PRESETS, parts_of
from simdiff.recovery.training.options import FineTuningOptions, preset
from simdiff.recovery.training.state import START, training_directory
from simdiff.surgery.copies import replace_parameter

_TEXT_OPTIONS = ("training_text", "examples", "train_on_prompts")
# Settings that are not recorded: what gave the number of steps, and what changes no weight.
_NOT_REMEMBERED = ("steps", "epochs", "max_minutes", "checkpoint_minutes")


def _recover(
    method: str,
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Tensor,
    *,
    pruned: PreTrainedModel,
    options: Mapping[str, Any],
    batch_size: int,
    context: RecoveryContext | None = None,
) -> RecoveryOutcome:
    context = context or RecoveryContext()
    if not plan.removed:
        raise SimdiffError(
            f"{method} recovery needs a plan that removes layers, got one of none: there is "
            "nothing to recover"
        )
    recipe, start, text = check(method, options)
    if method == "partial" and recipe.last_layers is None:
        recipe = replace(recipe, last_layers=_layers_at_the_cut(plan))
    examples = _examples(windows, recipe, context, text)
    train, set_apart = examples.set_apart(min(recipe.set_apart, max(1, len(examples) // 4)))
    begun = None
    if start == "closed-form":
        begun = _closed_form(model, plan, windows, pruned, batch_size, context.directory)
    result = fine_tune(
        pruned,
        train,
        set_apart,
        recipe,
        directory=context.directory,
        losses=context.losses,
        teacher=None if recipe.distillation is None else model,
    )
    return _outcome(method, recipe, result, begun, start, text, train, set_apart)


train_on_text: Recover = functools.partial(_recover, "lora")
"""LoRA on the text or on instructions; see `simdiff.recovery.methods.Recover`."""
train_last_layers: Recover = functools.partial(_recover, "partial")
"""The last layers and the head themselves; see `simdiff.recovery.methods.Recover`."""
distill: Recover = functools.partial(_recover, "distillation")
"""LoRA taught by the dense model's predictions; see `simdiff.recovery.methods.Recover`."""


def check(method: str, options: Mapping[str, Any]) -> tuple[FineTuningOptions, str, dict[str, Any]]:
    """Check the options before any work; return the recipe, the start and the text to train on.

    Raises:
        SimdiffError: `peft` is missing, an option is impossible, or the text cannot be read.
    """
    if method != "partial":
        require_peft()
    given = dict(options)
    name, start = given.pop("preset", None), given.pop("start", None)
    text = {key: given.pop(key) for key in _TEXT_OPTIONS if key in given}
    recipe = training_recipe(method, name, given)
    start = start or ("cut" if name == "paper" else "closed-form")
    if start not in STARTS:
        raise SimdiffError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    source = text.get("training_text")
    if source is not None and read_instructions(source) is None:
        check_text(source)
    return recipe, start, text


def training_recipe(method: str, name: str | None, changes: Mapping[str, Any]) -> FineTuningOptions:
    """The options of a training: a recipe by name, with the user's changes.

    Raises:
        SimdiffError: the recipe is of another method, an option is unknown, or a value is out of
            range.
    """
    presets = TRAINING_PRESETS[method]
    name = name or presets[0]
    if name not in presets:
        raise SimdiffError(
            f"preset of method {method} must be one of {', '.join(presets)}, got {name!r}"
        )
    changes = {parts_of("").get(key, key): value for key, value in changes.items()}
    if isinstance(changes.get("targets"), str):
        changes["targets"] = tuple(part for part in changes["targets"].split(",") if part)
    return preset(name, **changes)


def _layers_at_the_cut(plan: PruningPlan) -> int:
    """How many layers stay behind the first cut, and the one before it, which the closed form
    corrects too; where these are few, three or all there are."""
    behind = sum(layer > min(plan.removed) for layer in plan.kept)
    return min(len(plan.kept), max(behind + 1, LEAST))


def _examples(
    windows: Tensor, recipe: FineTuningOptions, context: RecoveryContext, text: Mapping[str, Any]
) -> Examples:
    source: Text | None = text.get("training_text")
    if source is None and f"{IN_MEMORY}, " not in context.text.get("source", f"{IN_MEMORY}, "):
        source = source_of_record(context.text)
    if source is None or context.tokenizer is None:  # tokens only
        return cut_windows(windows, recipe.length, context.text)
    return training_examples(
        source,
        context.tokenizer,
        length=recipe.length,
        seed=int(context.text.get("seed", 0)),
        num_examples=text.get("examples"),
        train_on_prompts=bool(text.get("train_on_prompts")),
    )


def _closed_form(
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Tensor,
    pruned: PreTrainedModel,
    batch_size: int,
    directory: Path | None,
) -> RecoveryOutcome:
    """Correct the model in closed form before training; an interrupted run does not repeat it."""
    key = {**evaluation_key(model, windows, {}), "removed": sorted(plan.removed)}
    path = None if directory is None else directory / START
    if path is not None and path.exists():
        return _load_start(path, key, pruned)
    outcome = closed_form.recover(
        model, plan, windows, pruned=pruned, options={}, batch_size=batch_size
    )
    if path is not None and directory is not None:
        shared = {id(parameter) for parameter in model.parameters()}
        changed = {
            name: parameter.detach().contiguous()
            for name, parameter in pruned.named_parameters()
            if id(parameter) not in shared
        }
        told = json.dumps({"key": key, "outcome": asdict(outcome)})
        with training_directory(directory):
            write_bytes(path, safetensors.torch.save(changed, {"simdiff": told}))
    return outcome


def _load_start(path: Path, key: dict[str, Any], pruned: PreTrainedModel) -> RecoveryOutcome:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["simdiff"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        outcome = RecoveryOutcome(**told["outcome"])
    except (KeyError, OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise SimdiffError(
            f"{path}: must hold the corrected weights that training started from, but is damaged "
            f"({type(error).__name__}: {error}): remove {path.parent} to start again"
        ) from None
    check_key(path, told["key"], key)
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        replace_parameter(pruned.get_submodule(module), last, tensor)
    return replace(outcome, notes=tuple(outcome.notes))


def _outcome(
    method: str,
    recipe: FineTuningOptions,
    result: FineTuning,
    begun: RecoveryOutcome | None,
    start: str,
    text: Mapping[str, Any],
    train: Examples,
    set_apart: Examples,
) -> RecoveryOutcome:
    how = "the text's next tokens" if recipe.distillation is None else "the dense model's logits"
    before = () if begun is None else begun.notes
    after = "" if begun is None else f" after the closed form ({begun.formula})"
    what = f"the last {recipe.last_layers} layers with what lies behind them, trained on {how}"
    lora: dict[str, Any] = {}
    if recipe.last_layers is None:
        what = (
            f"W + (alpha / rank) B A on {len(result.targets)} projections, A and B trained on {how}"
        )
        lora = {name: getattr(recipe.lora, field) for name, field in parts_of("lora").items()}
        lora["targets"] = ",".join(recipe.lora.targets) or None
    settings: dict[str, Any] = {
        "start": start,
        "steps": result.num_steps,  # the number that epochs or minutes gave, so that it repeats
        **lora,
        **{
            name: getattr(recipe, field)
            for name, field in parts_of("").items()
            if name not in _NOT_REMEMBERED
        },
        **text,
    }
    if recipe.distillation is not None:
        for name, field in parts_of("distillation").items():
            settings[name] = getattr(recipe.distillation, field)
    return RecoveryOutcome(
        formula=what + after,
        settings={key: value for key, value in settings.items() if value is not None},
        details={
            "training": result.to_dict(),
            "examples": {
                "train": len(train),
                "set_apart": len(set_apart),
                "tokens": train.num_tokens,
                **train.identity,
            },
            "start": None if begun is None else begun.details,
            "num_threads": torch.get_num_threads(),
        },
        notes=(*(f"the closed form before training: {note}" for note in before), *result.notes),
        trained=result.best_step > 0,
    )
