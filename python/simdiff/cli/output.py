"""Where a command's result goes: a file or a directory, standard output, or the terminal alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from simdiff.io import ranks
from simdiff.io.kinds import Kind

STANDARD_OUTPUT = "-"
# What a command writes, where it is the same for all of its options.
_KINDS = {
    "run": Kind.RUN,
    "score": Kind.SCORES,
    "plan": Kind.PLAN,
    "recover": Kind.MODEL,
    "eval": Kind.EVALUATION,
    "compare": Kind.COMPARISON,
    "bench": Kind.BENCH,
    "reproduce": Kind.REPRODUCTION,
    "report": Kind.PAGE,
    "profile": Kind.TRACE,
}
DIRECTORIES = (Kind.RUN, Kind.MODEL, Kind.COMPARISON, Kind.REPRODUCTION)


def output_kind(arguments: argparse.Namespace) -> Kind:
    """What the command writes at `--output`."""
    if arguments.command == "prune":
        from simdiff.checkpoints.gguf.cut import is_gguf

        return Kind.GGUF if is_gguf(arguments.model) else Kind.MODEL
    if arguments.command == "export":
        return {"mergekit": Kind.MERGEKIT, "vllm": Kind.MODEL}.get(arguments.format, Kind.LAYERS)
    return _KINDS[arguments.command]


def on_standard_output(arguments: argparse.Namespace) -> bool:
    """Whether `--output -` asks for the result on standard output."""
    return str(getattr(arguments, "output", None)) == STANDARD_OUTPUT


def write_output(arguments: argparse.Namespace, content: dict[str, Any] | str) -> None:
    """Write a result to the file of `--output` or to standard output; without, do nothing."""
    from simdiff.io.json_text import json_text
    from simdiff.io.outputs import write_new

    text = content if isinstance(content, str) else json_text(content)
    if on_standard_output(arguments):
        if ranks.prints():
            print(text, end="")
    elif arguments.output is not None:
        kind = output_kind(arguments)
        write_new(Path(arguments.output), text.encode(), arguments.overwrite, kind)


def show(arguments: argparse.Namespace, content: dict[str, Any], *tables: Any) -> None:
    """Print either JSON or what people read; nothing beside a result on standard output."""
    if on_standard_output(arguments) or not ranks.prints():
        return
    if arguments.json:
        print(json.dumps(content, indent=1, allow_nan=False))
        return
    from rich.console import Console

    # Away from a terminal a table keeps its own width instead of being cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for table in tables:
        console.print(table, soft_wrap=isinstance(table, str) and not sys.stdout.isatty())


def plan_lines(plan: Any) -> list[str]:
    """What went and why, for people."""
    from simdiff.planning.outcome import outcome_line

    order = ", ".join(map(str, plan.removed))
    alpha = "" if plan.alpha is None else f", alpha = {plan.alpha:g}"
    return [
        f"Removed, the least important first: {order}",
        f"Why: {plan.selection} by {plan.criterion}{alpha}: {plan.formula}",
        *(f"Note: {note}." for note in plan.notes),
        *([] if (reached := outcome_line(plan.outcome, plan.asked)) is None else ["", reached]),
        "",
    ]
