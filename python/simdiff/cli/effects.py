"""Options that have an effect only beside others: given without them, they are refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass

from simdiff.errors import SimdiffError
from simdiff.planning.names import DEFAULT_CRITERION, SEARCHED, WEIGHED


@dataclass(frozen=True)
class Effect:
    """Options of some commands, and what they need to have an effect."""

    commands: tuple[str, ...]
    options: tuple[str, ...]
    has: Callable[[argparse.Namespace], bool]
    needs: str


def _criteria(given: argparse.Namespace) -> set[str]:
    """The criteria of a command: one, or several."""
    several = getattr(given, "criteria", None)
    return set(several) if several is not None else {given.criterion}


EFFECTS = (
    Effect(
        ("run", "plan", "compare"),
        ("alpha",),
        lambda given: bool(_criteria(given) & set(WEIGHED)),
        f"a criterion that weighs by alpha: {', '.join(WEIGHED)}",
    ),
    Effect(
        ("run", "plan", "compare"),
        ("random_seed",),
        lambda given: "random" in _criteria(given),
        "the criterion random",
    ),
    Effect(
        ("run", "plan"),
        ("selection", "max_blocks", "bootstrap"),
        lambda given: given.criterion not in SEARCHED,
        "a criterion of scores, which does not search",
    ),
    Effect(
        ("plan",),
        ("bootstrap", "max_blocks"),
        lambda given: given.unit == "layer",
        "--unit layer",
    ),
    Effect(
        ("plan",),
        ("model",),
        lambda given: (
            given.criterion in SEARCHED
            or (given.criterion == DEFAULT_CRITERION and given.selection in (None, "blocks"))
        ),
        f"--criterion {DEFAULT_CRITERION}, which chooses blocks, or one that searches",
    ),
    Effect(("plan",), ("evaluation_windows", "effort"), lambda given: bool(given.model), "--model"),
    Effect(
        ("plan", "run"),
        ("effort",),
        lambda given: given.criterion == DEFAULT_CRITERION and given.selection in (None, "blocks"),
        f"--criterion {DEFAULT_CRITERION}, which chooses blocks",
    ),
    Effect(
        ("plan", "run"),
        ("evaluation_windows",),
        lambda given: given.criterion in (DEFAULT_CRITERION, *SEARCHED),
        f"--criterion {DEFAULT_CRITERION} or one that searches",
    ),
    Effect(
        ("score",),
        ("num_layers", "ratio"),
        lambda given: bool(given.calibrate_until_stable),
        "--calibrate-until-stable; a plan is made by `simdiff plan`",
    ),
    Effect(
        ("score", "run"),
        ("stable_confidence", "max_windows"),
        lambda given: bool(given.calibrate_until_stable),
        "--calibrate-until-stable",
    ),
    Effect(
        ("prune",),
        ("device", "threads"),
        lambda given: given.dtype != "auto",
        "--dtype: files are cut without running anything",
    ),
    Effect(
        ("eval",),
        ("num_windows", "window_length", "text_column", "seed", "stride", "part"),
        lambda given: given.text is not None,
        "--text",
    ),
    Effect(
        ("eval",),
        (
            "task_data",
            "limit",
            "num_fewshot",
            "task_path",
            "metric",
            "batch_size",
            "chat_template",
            "max_new_tokens",
        ),
        lambda given: given.tasks is not None,
        "--tasks",
    ),
    Effect(
        ("bench",),
        ("draft_tokens", "text", "text_column", "text_weights", "seed"),
        lambda given: given.draft,
        "--draft",
    ),
    Effect(
        ("score", "run", "compare", "recover", "eval", "profile", "bench"),
        ("text_weights",),
        lambda given: isinstance(given.text, list) and len(given.text) > 1,
        "--text given several times",
    ),
    Effect(
        ("score", "run", "plan", "compare", "recover", "eval"),
        ("stream_memory", "offload_folder"),
        lambda given: given.stream is not False,
        "a model that may be streamed, which --no-stream forbids",
    ),
    Effect(
        ("export",),
        ("model",),
        lambda given: given.format in ("mergekit", "vllm"),
        "--format mergekit or vllm: the other formats do not name the model",
    ),
    Effect(
        ("plan", "eval", "bench", "export"),
        ("overwrite",),
        lambda given: given.output is not None or getattr(given, "page", None) is not None,
        "--output",
    ),
)


def check_effects(arguments: argparse.Namespace, given: Collection[str]) -> None:
    """Refuse options that would have no effect.

    Args:
        arguments: all of them.
        given: names of those that the user gave.

    Raises:
        SimdiffError: names the option and what it needs.
    """
    for effect in EFFECTS:
        unheard = [name for name in effect.options if name in given]
        if arguments.command in effect.commands and unheard and not effect.has(arguments):
            flag = f"--{unheard[0].replace('_', '-')}"
            raise SimdiffError(f"{flag} has an effect only with {effect.needs}")
