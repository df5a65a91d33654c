"""`simdiff prune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_model, add_output, show

TEXT = "Write the model without the layers of a plan."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff prune`."""
    add_model(sub)
    sub.add_argument("--plan", type=Path, required=True, help="file written by `simdiff plan`")
    sub.add_argument(
        "--max-shard-size",
        default="50GB",
        metavar="SIZE",
        help="largest weight file, in bytes or such as 5GB",
    )
    add_output(sub, "new directory for the pruned checkpoint")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff prune`."""
    from simdiff.checkpoints.gguf.cut import is_gguf
    from simdiff.cli import prune_gguf

    if is_gguf(arguments.model):
        return prune_gguf.run(arguments)
    from simdiff.io.outputs import check_new_path
    from simdiff.jobs.prune import prune_checkpoint
    from simdiff.planning.plan import PruningPlan

    output = arguments.output.absolute()
    check_new_path(output, arguments.overwrite)
    plan = PruningPlan.load(arguments.plan)
    notes = prune_checkpoint(
        arguments.model,
        plan,
        output,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )
    removed = ", ".join(map(str, sorted(plan.removed)))
    show(
        arguments,
        {
            "output": str(arguments.output),
            "removed": list(plan.removed),
            "kept": list(plan.kept),
            "notes": list(notes),
        },
        f"Removed {len(plan.removed)} of {plan.num_layers} layers: {removed} (counted from 0)",
        *(f"Note: {note}" for note in notes),
        f"Checkpoint: {arguments.output}",
    )
