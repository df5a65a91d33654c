"""`simdiff reproduce`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.config import config_text
from simdiff.cli.evaluate import add_tasks, task_options
from simdiff.cli.options import add_held_out, add_output, add_placement, add_text, text_of
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser, rare

if TYPE_CHECKING:
    from simdiff.data.documents import Text

TEXT = "A table of the paper for your models, beside what it reports."
INTERRUPTED = "give the same command again to go on where it stopped"


def add(sub: CommandParser) -> None:
    """The options of `simdiff reproduce`."""
    from simdiff.jobs.published import TABLES

    sub.add_argument("table", choices=tuple(TABLES), metavar="TABLE", help=", ".join(TABLES))
    sub.group("model").add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="local directories or hub names, or 'demo' (SmolLM2-135M-Instruct)",
    )
    add_placement(sub)
    add_text(sub)
    add_held_out(sub)
    add_tasks(sub, " (default: the table's)")
    rare(
        sub.group("layers to remove"),
        "--evaluation-windows",
        type=int,
        default=8,
        metavar="N",
        help="calibration windows on which every alpha is evaluated",
    )
    rare(
        sub.group("measurement"),
        "--max-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="generate fewer tokens where the speed of a model would take longer; 0 measures none",
    )
    add_output(sub, "new directory for reproduction.json, reproduction.md and models/")
    rare(
        sub.group("output"),
        "--restart",
        action="store_true",
        help="forget what an interrupted call left in OUTPUT.journal",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff reproduce`."""
    from simdiff.data.text_options import TextOptions
    from simdiff.jobs.published import TABLES, WIKITEXT
    from simdiff.jobs.reproduce import ReproductionOptions, reproduce
    from simdiff.report.reproduction import reproduction_table

    source: Text = WIKITEXT[0]
    held_out = arguments.held_out
    if arguments.text is not None:
        source = text_of(arguments)
    elif held_out is None:
        held_out = WIKITEXT[1]
    amount = arguments.num_windows, arguments.window_length, arguments.seed
    content = reproduce(
        arguments.models,
        arguments.output,
        ReproductionOptions(
            arguments.table,
            TextOptions(source, *amount),
            task_options(arguments, TABLES[arguments.table].tasks),
            held_out,
            arguments.evaluation_windows,
            arguments.max_seconds,
            arguments.batch_size,
            arguments.dtype,
            arguments.device,
        ),
        overwrite=arguments.overwrite,
        restart=arguments.restart,
        config=config_text(arguments),
    )
    output: Path = arguments.output
    show(
        arguments,
        {**content, "output": str(output)},
        reproduction_table(content),
        *(f"Note: {note}." for note in content["notes"]),
        f"Table: {output / 'reproduction.md'}",
    )
