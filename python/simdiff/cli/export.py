"""`simdiff export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_output
from simdiff.cli.output import show, write_output
from simdiff.cli.parsing import CommandParser

TEXT = "A plan for mergekit, for llama.cpp, or as a plain list."

FORMATS = ("mergekit", "llama.cpp", "list")


def add(sub: CommandParser) -> None:
    """The options of `simdiff export`."""
    sub.add_argument(
        "plan",
        type=Path,
        metavar="PLAN",
        help="file written by `simdiff plan`, or a list of layers",
    )
    group = sub.group("format")
    group.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="mergekit: a passthrough configuration; llama.cpp: the value of "
        "`llama-quantize --prune-layers`; list: one removed layer a line; all count from 0",
    )
    group.add_argument("--model", help="how mergekit finds the model (default: the plan's name)")
    add_output(sub, "file to write (default: standard output)", required=False)


def needs_torch(arguments: argparse.Namespace) -> bool:
    """A plan is numbers and names."""
    return False


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff export`."""
    from simdiff.models.layer_indices import layer_runs
    from simdiff.planning.export import export_plan
    from simdiff.planning.plan import PruningPlan

    plan = PruningPlan.load(arguments.plan)
    text = export_plan(plan, arguments.format, arguments.model)
    write_output(arguments, text)
    content = {
        "format": arguments.format,
        "text": text,
        "output": None if arguments.output is None else str(arguments.output),
        "removed": sorted(plan.removed),
        "kept_runs": layer_runs(plan.kept) if plan.num_layers else None,
        "removed_runs": layer_runs(plan.removed),
    }
    if arguments.json or arguments.output is not None:
        show(arguments, content, f"Written: {arguments.output}")
    else:
        print(text, end="")  # for a pipe: nothing else, and no line is broken
