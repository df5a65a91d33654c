"""`simdiff compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.config import config_text
from simdiff.cli.log import add_log, log_of
from simdiff.cli.options import (
    add_choice,
    add_criteria_text,
    add_evaluation,
    add_held_out,
    add_model,
    add_output,
    add_text,
    text_of,
    text_options,
)
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser, layer_list, names
from simdiff.cli.streaming import add_stream, stream_options
from simdiff.planning.entry_points import known_criteria

TEXT = "Criteria against numbers of removed layers: quality, layers, time to plan."
SHARED = True
INTERRUPTED = "give the same command again to go on where it stopped"


def add(sub: CommandParser) -> None:
    """The options of `simdiff compare`."""
    add_model(sub)
    add_stream(sub)
    add_text(sub)
    add_held_out(sub)
    group = sub.group("layers to remove")
    group.add_argument(
        "--criteria",
        type=names,
        default=known_criteria(),
        metavar="NAMES",
        help="names between commas, see below (default: all)",
    )
    add_criteria_text(sub)
    group.add_argument(
        "--num-layers",
        type=layer_list,
        default=(),
        metavar="NUMBERS",
        help="numbers of layers to remove, such as 2,4,8-10 (default: six steps up to two fifths "
        "of the depth)",
    )
    add_choice(sub)
    add_evaluation(sub, None, " (default: 8 for searches and sweeps, 4 for simdiff)")
    add_output(sub, "new directory for compare.html, .csv, .json, plots, scores.json and plans/")
    add_log(sub)
    sub.group("output").add_argument(
        "--restart",
        action="store_true",
        help="forget what an interrupted call left in OUTPUT.journal",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse a model of the user's own without a text."""
    text_of(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff compare`."""
    from simdiff.comparison.compare import ComparisonOptions
    from simdiff.jobs.compare import run_comparison
    from simdiff.report.terminal.tables import comparison_table

    count = arguments.evaluation_windows
    windows = {} if count is None else {"evaluation_windows": count}
    windows |= {"search_windows": count} if count else {}
    with log_of(arguments) as log:
        comparison = run_comparison(
            arguments.model,
            arguments.output,
            text=text_options(arguments),
            options=ComparisonOptions(
                criteria=tuple(dict.fromkeys(arguments.criteria)),
                num_layers=arguments.num_layers,
                alpha=arguments.alpha,
                protect=arguments.protect,
                random_seed=arguments.random_seed,
                effort=arguments.effort,
                **windows,
            ),
            held_out_source=arguments.held_out,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=arguments.device,
            stream=stream_options(arguments),
            overwrite=arguments.overwrite,
            restart=arguments.restart,
            config=config_text(arguments),
            log=log,
        )
    output: Path = arguments.output
    show(
        arguments,
        {**comparison.to_dict(), "output": str(output)},
        comparison_table(comparison),
        f"Table:  {output / 'compare.csv'}",
        f"Report: {output / 'compare.html'}",
    )
