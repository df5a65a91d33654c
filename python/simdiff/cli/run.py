"""`simdiff run`."""

from __future__ import annotations

import argparse

from simdiff.cli.config import config_text
from simdiff.cli.log import add_log, log_of
from simdiff.cli.options import (
    add_evaluation,
    add_held_out,
    add_model,
    add_output,
    add_plan,
    add_scoring,
    add_text,
    plan_options,
    scoring_options,
    text_of,
    text_options,
)
from simdiff.cli.output import plan_lines, show
from simdiff.cli.parsing import CommandParser, rare
from simdiff.cli.streaming import add_stream, stream_options

TEXT = "The whole way: score, plan, prune, reload, evaluate, report."
SHARED = True
INTERRUPTED = "nothing was written; a search goes on where it stopped if it is started again"


def add(sub: CommandParser) -> None:
    """The options of `simdiff run`."""
    add_model(sub)
    add_stream(sub)
    add_text(sub)
    add_held_out(sub)
    add_scoring(sub)
    add_plan(sub)
    add_evaluation(sub, 4, " (0: no evaluation)")
    rare(
        sub.group("measurement"),
        "--speed-rounds",
        type=int,
        default=5,
        metavar="N",
        help="timed rounds of the speed test, which takes most of a short run's time (0: none)",
    )
    add_output(sub, "new directory for model/, report.html, scores.json, plan.json, results.json")
    add_log(sub)


def check(arguments: argparse.Namespace) -> None:
    """Refuse a model of the user's own without a text."""
    text_of(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff run`."""
    from simdiff.jobs.run import run
    from simdiff.report.speed_notes import busy_note, measured_by
    from simdiff.report.terminal.tables import layers_table, results_table

    with log_of(arguments) as log:
        outcome = run(
            arguments.model,
            arguments.output,
            text=text_options(arguments),
            plan=plan_options(arguments),
            scoring=scoring_options(arguments),
            held_out_source=arguments.held_out,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=arguments.device,
            stream=stream_options(arguments),
            overwrite=arguments.overwrite,
            speed_rounds=arguments.speed_rounds,
            config=config_text(arguments),
            log=log,
        )
    plan, results = outcome.plan, outcome.results
    sample = results["pruned"].get("generation")
    written = []
    if sample is not None:
        agrees = "agrees with" if sample["equals_uncached"] else "DIFFERS from"
        written = [
            f"The pruned model continues with the KV cache, which {agrees} a forward without:\n"
            f"  {sample['prompt']}{sample['text']}\n"
        ]
    show(
        arguments,
        {
            **results,
            "output": str(outcome.directory),
            "removed": list(plan.removed),
            "notes": list(plan.notes),
        },
        layers_table(outcome.scores, plan),
        *plan_lines(plan),
        results_table(results),
        *filter(None, [busy_note(measured_by(None, results))]),
        *written,
        f"Checkpoint: {outcome.directory / 'model'}",
        f"Report:     {outcome.directory / 'report.html'}",
    )
