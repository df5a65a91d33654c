"""`simdiff prune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.config import config_text
from simdiff.cli.layers import add_plan_source, plan_source
from simdiff.cli.options import add_model, add_output
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser, rare

TEXT = "Write the model without the layers of a plan."


def add(sub: CommandParser) -> None:
    """The options of `simdiff prune`."""
    add_model(sub)
    add_output(sub, "new directory for the pruned checkpoint, or new GGUF file")
    add_plan_source(sub, "layers to remove")
    rare(
        sub.group("output"),
        "--max-shard-size",
        default="50GB",
        metavar="SIZE",
        help="largest weight file, in bytes or such as 5GB",
    )


def needs_torch(arguments: argparse.Namespace) -> bool:
    """The stock classes of transformers prove a cut of safetensors; GGUF has rules of its own."""
    from simdiff.checkpoints.gguf.cut import is_gguf

    return not is_gguf(arguments.model)


def check(arguments: argparse.Namespace) -> None:
    """Refuse layers that are named twice or not at all, and options that GGUF files have not."""
    from simdiff.checkpoints.gguf.cut import is_gguf
    from simdiff.errors import SimdiffError

    plan_source(arguments)
    for option in ("dtype", "device"):
        given = getattr(arguments, option, None) not in (None, "auto")
        if is_gguf(arguments.model) and given:
            raise SimdiffError(
                f"--{option} must not be given for a GGUF file: its tensors are copied as stored"
            )


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff prune`."""
    from simdiff.checkpoints.gguf.cut import is_gguf

    if is_gguf(arguments.model):
        return _run_gguf(arguments)
    from simdiff.jobs.plans import plan_for
    from simdiff.jobs.prune import prune_checkpoint
    from simdiff.planning.outcome import in_dtype, outcome_line

    output = arguments.output.absolute()
    plan = plan_for(arguments.model, plan_source(arguments))
    notes = prune_checkpoint(
        arguments.model,
        plan,
        output,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        config=config_text(arguments),
    )
    removed = ", ".join(map(str, sorted(plan.removed)))
    outcome = in_dtype(plan.outcome, arguments.dtype)
    show(
        arguments,
        {
            "output": str(arguments.output),
            "removed": list(plan.removed),
            "kept": list(plan.kept),
            "notes": list(notes),
            "outcome": outcome,
        },
        f"Removed {len(plan.removed)} of {plan.num_layers} layers: {removed} (counted from 0)",
        *filter(None, [outcome_line(outcome, {})]),
        *(f"Note: {note}" for note in notes),
        f"Checkpoint: {arguments.output}",
    )


def _run_gguf(arguments: argparse.Namespace) -> None:
    """The same on a GGUF file: neither torch nor transformers is loaded."""
    from simdiff.checkpoints.gguf.cut import gguf_depth, prune_gguf
    from simdiff.io.progress import step

    plan = plan_source(arguments)
    if plan.by_hand:
        plan = plan.of_depth(gguf_depth(Path(arguments.model)), arguments.model)
    with step("cut the GGUF file"):
        cut = prune_gguf(
            Path(arguments.model), plan, arguments.output, overwrite=arguments.overwrite
        )
    removed = ", ".join(map(str, sorted(plan.removed)))
    show(
        arguments,
        {
            "output": str(arguments.output),
            "removed": list(plan.removed),
            "kept": list(cut.kept),
            "changes": list(cut.changes),
            "num_bytes": cut.num_bytes,
        },
        f"Removed {len(plan.removed)} of {plan.num_layers} blocks: {removed} (counted from 0)",
        *(f"Metadata: {change}" for change in cut.changes),
        f"GGUF file: {arguments.output} ({cut.num_bytes / 1e6:.1f} MB)",
    )
