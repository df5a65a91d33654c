"""`simdiff prune` on a GGUF file; not a subcommand of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import show


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff prune` on a GGUF file."""
    from simdiff.checkpoints.gguf.cut import prune_gguf
    from simdiff.errors import SimdiffError
    from simdiff.io.progress import step
    from simdiff.planning.plan import PruningPlan

    for option in ("dtype", "device"):
        if getattr(arguments, option, None) not in (None, "auto"):
            raise SimdiffError(
                f"--{option} must not be given for a GGUF file: its tensors are copied as stored"
            )
    plan = PruningPlan.load(arguments.plan)
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
