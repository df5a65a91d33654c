"""`simdiff eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_model, add_text, show, text_options

TEXT = "Perplexity of one or more models on the same text."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff eval`."""
    add_model(sub, several=True)
    add_text(sub)
    sub.add_argument("--part", choices=("held-out", "calibration", "all"), default="held-out",
                     help="part of the text; `score` does not read held-out")  # fmt: skip
    sub.add_argument("--plan", type=Path, help="of layers or of sub-layers: the one model is "
                     "measured as it is and with the plan applied in memory")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff eval`."""
    from simdiff.pipeline import evaluate
    from simdiff.tables import evaluation_table

    if arguments.plan is not None:
        return _with_plan(arguments)
    results = evaluate(
        arguments.models,
        text=text_options(arguments),
        part=arguments.part,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    show(arguments, results, evaluation_table(results))


def _with_plan(arguments: argparse.Namespace) -> None:
    from simdiff.errors import SimdiffError
    from simdiff.plan_evaluation import evaluate_plan
    from simdiff.tables import evaluation_table

    if len(arguments.models) != 1:
        raise SimdiffError(f"--plan goes with one model, got {len(arguments.models)}")
    results = evaluate_plan(
        arguments.models[0],
        arguments.plan,
        text=text_options(arguments),
        part=arguments.part,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    removed = f"Removed in memory: {', '.join(results['removed'])}"
    show(arguments, results, evaluation_table(results), removed)
