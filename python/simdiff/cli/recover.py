"""`simdiff recover`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simdiff.cli.options import add_model, add_output, add_text, show, text_options
from simdiff.recovery.methods import METHODS

TEXT = "Cut a model by a plan and repair the layers that stay; writes a stock checkpoint."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff recover`."""
    add_model(sub)
    sub.add_argument("--plan", type=Path, required=True, help="file written by `simdiff plan`")
    methods = "; ".join(f"{name}: {method.text}" for name, method in METHODS.items())
    sub.add_argument("--method", choices=tuple(METHODS), default="closed-form", help=methods)
    add_text(sub)
    sub.add_argument("--held-out", metavar="TEXT", help="another text to evaluate on, whole "
                     "(default: the held-out half of --text)")  # fmt: skip
    add_output(sub, "new directory for the recovered checkpoint")
    _add_method_options(sub)
    sub.set_defaults(windows=64)


def _add_method_options(sub: argparse.ArgumentParser) -> None:
    """Options of single methods; None where not given, their defaults are the method's."""


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of methods that were given, by the names in `Method.options`."""
    names = {name for method in METHODS.values() for name in method.options}
    given = {name: getattr(arguments, name, None) for name in sorted(names)}
    return {name: value for name, value in given.items() if value is not None}


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff recover`."""
    from simdiff.recovery.job import recover
    from simdiff.selection import PruningPlan
    from simdiff.tables import recovery_table

    record = recover(
        arguments.model,
        arguments.output,
        plan=PruningPlan.load(arguments.plan),
        method=arguments.method,
        text=text_options(arguments),
        held_out_source=arguments.held_out,
        options=method_options(arguments),
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    show(
        arguments,
        record.to_dict() | {"output": str(arguments.output)},
        recovery_table(record),
        *(f"Note: {note}." for note in record.notes),
        f"Checkpoint: {arguments.output}",
    )
