"""`simdiff score`."""

from __future__ import annotations

import argparse
import shlex

from simdiff.cli.options import (
    add_amount,
    add_model,
    add_output,
    add_scoring,
    add_text,
    scoring_options,
    text_of,
    text_options,
)
from simdiff.cli.output import show, write_output
from simdiff.cli.parsing import CommandParser
from simdiff.cli.streaming import add_stream, stream_options

TEXT = "Score every layer on calibration text; write scores.json."
INTERRUPTED = (
    "nothing was written; a streamed model goes on from its last finished layer if it is started "
    "again"
)


def add(sub: CommandParser) -> None:
    """The options of `simdiff score`."""
    add_model(sub)
    add_stream(sub)
    add_text(sub)
    add_scoring(sub)
    sub.group("calibration").add_argument(
        "--sublayers",
        action="store_true",
        help="also score the attention and the MLP of every layer, for `simdiff plan --unit`",
    )
    stable = "the plan that has to be stable, with --calibrate-until-stable"
    sub.group(stable, "Of the default criterion; `simdiff run` takes any other.")
    add_amount(sub, stable)
    add_output(sub, "file to write, such as scores.json; - is standard output")


def check(arguments: argparse.Namespace) -> None:
    """Refuse a model of the user's own without a text."""
    text_of(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff score`."""
    from simdiff.jobs.calibrate import calibrate
    from simdiff.models.loading import load_model
    from simdiff.models.sweep import remove_states
    from simdiff.planning.budget import Budget
    from simdiff.planning.options import PlanOptions
    from simdiff.report.terminal.sublayers import sublayers_table
    from simdiff.report.terminal.tables import leading_table, scores_table

    scoring = scoring_options(arguments)
    plan = PlanOptions(budget=Budget(num_layers=arguments.num_layers, ratio=arguments.ratio))
    text = text_options(arguments)
    text.check()
    model, tokenizer = load_model(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        stream=stream_options(arguments),
    )
    scores, _ = calibrate(
        model,
        tokenizer,
        arguments.model,
        text=text,
        plan=plan,
        scoring=scoring,
        batch_size=arguments.batch_size,
    )
    write_output(arguments, scores.to_dict())
    remove_states(model)
    notes = [] if scores.stability is None else [f"Note: {scores.stability['note']}."]
    tables = [scores_table(scores), *([leading_table(scores)] if scores.leading else [])]
    tables += [sublayers_table(scores)] if arguments.sublayers else []
    read = scores.calibration
    show(
        arguments,
        scores.to_dict(),
        *tables,
        f"Read: {read['num_windows']} windows of {read['window_length']} tokens of the "
        f"{read['part']} half of {read['source']}. What the columns mean: docs/guide.md.",
        *notes,
        f"Scores: {arguments.output}",
        f"Next: simdiff plan {shlex.quote(str(arguments.output))} --model "
        f"{shlex.quote(arguments.model)} --num-layers N",
    )
