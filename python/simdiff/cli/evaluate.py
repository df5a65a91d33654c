"""`simdiff eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.layers import add_plan_source
from simdiff.cli.options import (
    add_batch_size,
    add_model,
    add_output,
    add_text,
    text_of,
)
from simdiff.cli.output import show, write_output
from simdiff.cli.parsing import CommandParser, names, rare
from simdiff.cli.streaming import add_stream, stream_options
from simdiff.errors import SimdiffError

if TYPE_CHECKING:
    from simdiff.evaluation.tasks import TaskOptions

TEXT = "Perplexity and tasks: several models on the same text and items, the first the dense one."
SHARED = True


def add(sub: CommandParser) -> None:
    """The options of `simdiff eval`."""
    add_model(sub, several=True)
    add_stream(sub)
    add_plan_source(
        sub,
        "model with and without layers",
        "; of sub-layers too: the one model is measured as it is and with the plan applied in "
        "memory",
    )
    add_text(sub, optional=True)
    group = sub.group("text")
    rare(
        group,
        "--stride",
        type=int,
        metavar="TOKENS",
        help="from the start of one window to the next; what a window shares with the one before "
        "is context alone (default: the window's length, no overlap)",
    )
    rare(
        group,
        "--part",
        choices=("held-out", "calibration", "all"),
        default="held-out",
        help="which part of the text to read; `score` reads calibration alone",
    )
    add_tasks(sub)
    add_batch_size(sub.group("tasks"), "requests of tasks per forward")
    add_output(sub, "new JSON file for the results; - is standard output", required=False)


def add_tasks(sub: CommandParser, usual: str = "") -> None:
    """Which tasks, and how they are asked; `usual` ends the help of the names."""
    group = sub.group("tasks")
    group.add_argument(
        "--tasks",
        type=names,
        metavar="NAMES",
        help="names of lm_eval's tasks, of choices (piqa,arc_easy) or of answers that are written "
        f"(triviaqa,gsm8k); needs simdiff-kernels[eval]{usual}",
    )
    group.add_argument(
        "--task-data",
        metavar="DIR",
        help="'demo' (what comes with the demo's text), or a directory with TASK/SPLIT.parquet "
        "(.arrow, .json, .jsonl), or TASK.parquet for the split that is evaluated; columns as on "
        "the hub, which is asked if this is not given",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="measure N items of each task, drawn at random, always the same",
    )
    rare(
        group,
        "--num-fewshot",
        type=int,
        metavar="N",
        help="number of solved examples before each item (default: as each task's file says, which "
        "mostly is 0)",
    )
    rare(
        group,
        "--chat-template",
        action="store_true",
        help="ask as a user does, by the model's chat template: for instruct models",
    )
    rare(
        group,
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="write answers of at most N tokens (default: what each task's file allows)",
    )
    rare(
        group,
        "--task-path",
        type=Path,
        metavar="DIR",
        help="directory with task files (YAML) of your own",
    )
    rare(
        group,
        "--metric",
        choices=("acc_norm", "acc"),
        default="acc_norm",
        help="metric to average where a task has it; otherwise acc",
    )


def task_options(arguments: argparse.Namespace, usual: Sequence[str] = ()) -> TaskOptions:
    """What `add_tasks` asked for; `usual` are the tasks where none is named."""
    from simdiff.evaluation.tasks import TaskOptions

    return TaskOptions(
        tuple(arguments.tasks or usual),
        data=arguments.task_data,
        path=arguments.task_path,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        batch_size=arguments.batch_size,
        metric=arguments.metric,
        chat_template=arguments.chat_template,
        max_new_tokens=arguments.max_new_tokens,
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse neither text nor tasks, and a plan for several models."""
    if arguments.text is None and arguments.tasks is None:
        raise SimdiffError("--text, --tasks or both must be given, got neither")
    several = len(arguments.models)
    for name in arguments.models:
        if (count := arguments.models.count(name)) > 1:
            times = "twice" if count == 2 else f"{count} times"
            raise SimdiffError(f"each model must be given once, got {name} {times}")
    if (arguments.plan or arguments.remove) and several != 1:
        raise SimdiffError(f"--plan and --remove go with one model, got {several}")
    if arguments.plan and arguments.remove:
        raise SimdiffError("--plan or --remove must say which layers go, got both")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff eval`."""
    from simdiff.evaluation.quality import Subject, TextChoice, evaluate_models
    from simdiff.jobs.evaluate import with_plan
    from simdiff.report.terminal.quality import quality_table

    text = tasks = None
    if arguments.text is not None:
        text = TextChoice(
            text_of(arguments),
            arguments.num_windows,
            arguments.window_length,
            arguments.stride,
            arguments.part,
            arguments.seed,
        )
    if arguments.tasks is not None:
        tasks = task_options(arguments)
    models: Sequence[str | Subject] = arguments.models
    removed: list[str] | None = None
    stream = stream_options(arguments)
    plan = arguments.plan or arguments.remove
    if plan is not None:
        models, removed = with_plan(
            arguments.models[0],
            plan,
            dtype=arguments.dtype,
            device=arguments.device,
            stream=stream,
        )
    quality = evaluate_models(
        models,
        text=text,
        tasks=tasks,
        dtype=arguments.dtype,
        device=arguments.device,
        stream=stream,
    )
    content = {**quality.to_dict(), "command": arguments.command_line}
    if removed is not None:
        content["removed"] = removed
        content["notes"].append(f"removed in memory: {', '.join(removed)}")
    write_output(arguments, content)
    show(
        arguments,
        content,
        quality_table(quality),
        *(f"Note: {note}." for note in content["notes"]),
    )
