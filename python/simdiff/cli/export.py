"""`simdiff export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_output
from simdiff.cli.output import show, write_output
from simdiff.cli.parsing import CommandParser
from simdiff.errors import SimdiffError
from simdiff.planning.plan import is_sublayer_plan

TEXT = "A plan for mergekit, for llama.cpp, for vLLM, or as a plain list."

FORMATS = ("mergekit", "llama.cpp", "list", "vllm")
VLLM = FORMATS[-1]


def add(sub: CommandParser) -> None:
    """The options of `simdiff export`."""
    sub.add_argument(
        "plan",
        type=Path,
        metavar="PLAN",
        help="file written by `simdiff plan` (of sub-layers for vllm), or a list of layers",
    )
    group = sub.group("format")
    group.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="mergekit: a passthrough configuration; llama.cpp: the value of "
        "`llama-quantize --prune-layers`; list: one removed layer a line, from 0; vllm: a "
        "directory of a LLaMA model without the sub-layers of a plan, for vLLM's no-op blocks",
    )
    group.add_argument(
        "--model",
        help="how mergekit finds the model (default: the plan's name); for vllm its directory",
    )
    add_output(
        sub, "file, or for vllm directory, to write (default: standard output)", required=False
    )


def needs_torch(arguments: argparse.Namespace) -> bool:
    """A plan is numbers and names; the files of a model are checked against its config."""
    return bool(arguments.format == VLLM)


def check(arguments: argparse.Namespace) -> None:
    """Refuse a directory without its model or its place."""
    if arguments.format != VLLM:
        return
    for name in ("model", "output"):
        if getattr(arguments, name) is None:
            raise SimdiffError(f"--{name} must be given with --format {VLLM}")
    if not is_sublayer_plan(arguments.plan):
        raise SimdiffError(
            f"{arguments.plan}: must be a plan of sub-layers for --format {VLLM} (`simdiff plan "
            "--unit sublayer`), and is none"
        )


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff export`."""
    if arguments.format == VLLM:
        return _run_vllm(arguments)
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


def _run_vllm(arguments: argparse.Namespace) -> None:
    """Write the directory of a model without the sub-layers of a plan."""
    from simdiff.checkpoints.no_op_blocks import write_no_op_blocks
    from simdiff.models.loading import source_directory
    from simdiff.sublayers.plan import SublayerPlan

    plan = SublayerPlan.load(arguments.plan)
    source = source_directory(arguments.model)
    write_no_op_blocks(source, plan, arguments.output.absolute(), overwrite=arguments.overwrite)
    removed = [str(name) for name in sorted(plan.removed)]
    show(
        arguments,
        {"format": VLLM, "output": str(arguments.output), "removed": removed},
        f"Without {', '.join(removed)} (layers count from 0)",
        f"For vLLM: vllm serve {arguments.output} --trust-remote-code",
    )
