"""`simdiff prune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.options import add_model, add_output, show

if TYPE_CHECKING:
    from simdiff.selection import PruningPlan

TEXT = "Write the model without the layers of a plan."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff prune`."""
    add_model(sub)
    sub.add_argument("--plan", type=Path, required=True, help="file written by `simdiff plan`")
    sub.add_argument("--max-shard-size", default="50GB", metavar="SIZE",
                     help="largest weight file, in bytes or such as 5GB")  # fmt: skip
    add_output(sub, "new directory for the pruned checkpoint")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff prune`."""
    from simdiff.cli import prune_gguf
    from simdiff.gguf_files import is_gguf

    if is_gguf(arguments.model):
        return prune_gguf.run(arguments)
    from simdiff.checkpoint import check_output, cut_checkpoint, write_cut
    from simdiff.files import check_new_path, new_directory
    from simdiff.model_card import write_card
    from simdiff.models import source_directory
    from simdiff.selection import PruningPlan

    output = arguments.output.absolute()
    check_new_path(output, arguments.overwrite)
    plan = PruningPlan.load(arguments.plan)
    source = source_directory(arguments.model)
    check_output(source, output)
    notes: tuple[str, ...] = ()
    if arguments.dtype == "auto":
        cut = cut_checkpoint(source, plan, max_shard_size=arguments.max_shard_size)
        with new_directory(output, arguments.overwrite) as scratch:
            write_cut(cut, scratch)
            write_card(scratch, plan, arguments.model)
        notes = cut.notes
    else:
        _convert(arguments, source, plan)
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


def _convert(arguments: argparse.Namespace, source: Path, plan: PruningPlan) -> None:
    """Another dtype than the stored one takes a model in memory."""
    from simdiff.checkpoint import write_pruned
    from simdiff.files import new_directory
    from simdiff.model_card import write_card
    from simdiff.models import load_model

    model, tokenizer = load_model(str(source), dtype=arguments.dtype, device=arguments.device)
    with new_directory(arguments.output, arguments.overwrite) as scratch:
        write_pruned(model, tokenizer, plan, scratch, max_shard_size=arguments.max_shard_size)
        write_card(scratch, plan, arguments.model)
