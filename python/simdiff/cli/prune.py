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
    add_output(sub, "new directory for the pruned checkpoint")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff prune`."""
    from simdiff.cli import prune_gguf
    from simdiff.gguf_files import is_gguf

    if is_gguf(arguments.model):
        return prune_gguf.run(arguments)
    from simdiff.checkpoint import write_pruned
    from simdiff.files import check_new_path, new_directory
    from simdiff.model_card import write_card
    from simdiff.models import load_model
    from simdiff.selection import PruningPlan

    check_new_path(arguments.output.absolute(), arguments.overwrite)
    plan = PruningPlan.load(arguments.plan)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    with new_directory(arguments.output, arguments.overwrite) as scratch:
        write_pruned(model, tokenizer, plan, scratch)
        write_card(scratch, plan, arguments.model)
    removed = ", ".join(map(str, sorted(plan.removed)))
    show(
        arguments,
        {"output": str(arguments.output), "removed": list(plan.removed), "kept": list(plan.kept)},
        f"Removed {len(plan.removed)} of {plan.num_layers} layers: {removed} (counted from 0)",
        f"Checkpoint: {arguments.output}",
    )
