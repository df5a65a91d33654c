"""`simdiff plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_evaluation, add_output, add_plan, plan_lines, plan_options, show

TEXT = "Choose the layers that go, from saved scores; a model helps, but is not needed."
INTERRUPTED = "no plan was written; a search goes on where it stopped if it is started again"


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff plan`."""
    sub.add_argument("scores", type=Path, help="file written by `simdiff score`")
    add_plan(sub)
    sub.add_argument("--model", help="the model of the scores: simdiff then chooses among a few "
                     "plans by perplexity on the text that calibrated")  # fmt: skip
    add_evaluation(sub)
    add_output(sub, "file to write, such as plan.json")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff plan`."""
    from simdiff.files import check_new_file
    from simdiff.pipeline import calibrated, search_journal
    from simdiff.scores import LayerScores
    from simdiff.tables import layers_table

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    scores = LayerScores.load(arguments.scores)
    options = plan_options(arguments)
    journal = search_journal(arguments.output)
    if arguments.model is None:
        plan = options.plan(scores)
    else:
        model, windows = calibrated(arguments.model, scores)
        plan = options.plan(scores, model, windows, journal)
    plan.save(arguments.output)
    journal.unlink(missing_ok=True)
    show(
        arguments,
        plan.to_dict(),
        layers_table(scores, plan),
        *plan_lines(plan),
        f"Plan: {arguments.output}",
    )
