"""What can be known to be wrong before torch, transformers or a model is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from simdiff.cli.effects import check_effects
from simdiff.cli.output import DIRECTORIES, on_standard_output, output_kind
from simdiff.errors import SimdiffError, nearest, nearest_path
from simdiff.io.kinds import Kind
from simdiff.planning.entry_points import known_criteria

# Options that name a file or a directory which must be there.
_PATHS = (
    *("scores", "plan", "directory", "source", "evaluation", "bench", "recovery", "comparison"),
    *("task_data", "task_path", "training_text", "states"),
)
_MODELS = ("model", "models", "pruned", "against")
_TEXTS = ("text", "held_out")
# What a number must be at least.
_LEAST = {
    "num_windows": 1,
    "window_length": 2,
    "stride": 1,
    "batch_size": 1,
    "batch_sizes": 1,
    "prompt_lengths": 1,
    "groups": 1,
    "limit": 1,
    "max_new_tokens": 1,
    "num_fewshot": 0,
    "max_blocks": 1,
    "bootstrap": 0,
    "evaluation_windows": 0,
    "skip_leading": 0,
    "new_tokens": 1,
    "draft_tokens": 1,
    "repeats": 1,
    "warm_up": 0,
    "speed_rounds": 0,
    "threads": 1,
}
# More threads than this for each CPU are a slip of the keyboard, and thousands end the process.
_THREADS_OF_A_CPU = 4


def check(arguments: argparse.Namespace, given: Collection[str]) -> None:
    """Refuse what cannot be.

    Args:
        arguments: of a command.
        given: names of the options that the user gave.

    Raises:
        SimdiffError: says what is wrong.
    """
    _check_numbers(arguments)
    check_effects(arguments, given)
    for name in _values(arguments, _MODELS):
        _check_model(name, arguments)
    for name in _values(arguments, _PATHS):
        if name not in ("demo", "-") and not Path(name).exists():
            raise SimdiffError(f"{name}: No such file or directory{nearest_path(Path(name))}")
    for name in getattr(arguments, "criteria", ()):
        if name not in known_criteria():
            meant = nearest(name, known_criteria())
            raise SimdiffError(f"--criteria: there is no criterion {name!r}{meant}")
    for name in getattr(arguments, "log", ()):
        from simdiff.io.trackers import check_tracker

        check_tracker(name)
    if getattr(arguments, "output", None) is not None and arguments.command not in (
        "plot",  # writes a file for every figure
        "rerun",  # what it gives again checks
    ):
        _check_output(arguments)
    _check_layers(arguments)
    _check_texts(arguments)


def _values(arguments: argparse.Namespace, names: Collection[str]) -> Iterator[str]:
    for name in names:
        value: Any = getattr(arguments, name, None)
        if value is not None:
            yield from map(str, value if isinstance(value, list) else [value])


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(arguments, name, None)
        least = 0 if (name, arguments.command) == ("num_windows", "eval") else least
        low = min(value, default=least) if isinstance(value, (list, tuple)) else value
        if isinstance(low, int) and low < least:
            flag = name.replace("_", "-")
            raise SimdiffError(f"--{flag} must be at least {least}, got {low}")
    stride, window = (getattr(arguments, name, None) for name in ("stride", "window_length"))
    if stride is not None and window is not None and stride > window:
        raise SimdiffError(f"--stride must be 1 to {window} tokens (a window), got {stride}")
    threads, most = getattr(arguments, "threads", None), _THREADS_OF_A_CPU * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise SimdiffError(
            f"--threads must be at most {most} on this machine, {_THREADS_OF_A_CPU} for each of "
            f"its {os.cpu_count()} CPUs, got {threads}"
        )


def _check_model(name: str, arguments: argparse.Namespace) -> None:
    from simdiff.models.files import check_kind, check_name

    if name == "demo" or arguments.command == "export":  # whose model may be elsewhere
        return
    check_name(name)
    of_gguf = arguments.command == "prune" and output_kind(arguments) is Kind.GGUF
    if Path(name).exists() and not of_gguf and arguments.command != "doctor":
        check_kind(Path(name))  # doctor tells more of it


def _check_texts(arguments: argparse.Namespace) -> None:
    from simdiff.cli.options import text_of
    from simdiff.data.documents import check_text, with_column

    if getattr(arguments, "text", None) is not None:
        check_text(text_of(arguments))
    columns = getattr(arguments, "text_column", None) or [None]
    for name in _values(arguments, ("held_out",)):
        check_text(with_column(name, columns[0] if len(columns) == 1 else None))


def _check_output(arguments: argparse.Namespace) -> None:
    from simdiff.io.outputs import check_new_file, check_new_path, check_not_input

    kind = output_kind(arguments)
    if on_standard_output(arguments):
        if kind in (*DIRECTORIES, Kind.GGUF):
            raise SimdiffError(f"--output - is for text; {kind.value} needs a path")
        return
    output = Path(arguments.output).absolute()
    inputs = [*_values(arguments, (*_MODELS, *_PATHS, *_TEXTS)), *_values(arguments, ("config",))]
    if arguments.overwrite:
        check_not_input(output, [Path(name) for name in inputs if name != "demo"])
    (check_new_path if kind in DIRECTORIES else check_new_file)(output, arguments.overwrite, kind)


def _check_layers(arguments: argparse.Namespace) -> None:
    """Plans can be read, and a model has the layers that are named."""
    from simdiff.models.files import stored_depth
    from simdiff.planning.plan import PruningPlan, is_sublayer_plan

    model = next(_values(arguments, _MODELS), None)
    depth = None if model is None else stored_depth(model)
    plan = None
    if getattr(arguments, "remove", None) is not None:
        plan = PruningPlan(arguments.remove)
    elif getattr(arguments, "plan", None) is not None:
        parts = arguments.command == "eval" or getattr(arguments, "format", None) == "vllm"
        whole = not (parts and is_sublayer_plan(arguments.plan))
        plan = PruningPlan.load(arguments.plan) if whole else None
    if plan is not None and depth is not None:
        plan.of_depth(depth, str(model))
    if arguments.command == "run":
        from simdiff.cli.options import plan_options

        options = plan_options(arguments)
        if depth is not None and not options.budget.needs_sizes:
            options.count({"num_layers": depth})
    if arguments.command == "score" and arguments.calibrate_until_stable and depth is not None:
        from simdiff.planning.budget import Budget
        from simdiff.planning.options import PlanOptions

        budget = Budget(num_layers=arguments.num_layers, ratio=arguments.ratio)
        PlanOptions(budget=budget).count({"num_layers": depth})
    if arguments.command == "compare" and depth is not None:
        from simdiff.planning.selection import check_selection

        for count in arguments.num_layers or ():
            check_selection(depth, count, arguments.protect)
