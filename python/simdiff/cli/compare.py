"""`simdiff compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import (
    COMPARED,
    add_evaluation,
    add_model,
    add_output,
    add_text,
    layer_list,
    show,
    text_options,
)

TEXT = "Criteria against numbers of removed layers: quality, layers, time to plan."
INTERRUPTED = "give the same command again to go on where it stopped"


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff compare`."""
    add_model(sub)
    add_text(sub)
    sub.add_argument(
        "--held-out",
        metavar="TEXT",
        help="evaluate on this text (default: the half of --text that does not calibrate)",
    )
    sub.add_argument(
        "--criteria",
        type=lambda text: tuple(text.split(",")),
        default=COMPARED,
        metavar="NAMES",
        help="separated by commas (default: all)",
    )
    sub.add_argument(
        "--num-layers",
        type=layer_list,
        default=(),
        metavar="NUMBERS",
        help="numbers of layers to remove, such as 2,4,8-10 (default: six steps up to "
        "two fifths of the depth)",
    )
    sub.add_argument(
        "--alpha",
        type=float,
        default=0.5,
        help="weight of difference against similarity, 0 to 1, for the paper's "
        "criteria; those named -swept sweep it",
    )
    sub.add_argument(
        "--protect",
        type=layer_list,
        default=(),
        metavar="LAYERS",
        help="layers that stay, such as 0,1,28-29 (counted from 0)",
    )
    sub.add_argument(
        "--random-seed", type=int, default=0, metavar="SEED", help="of the criterion random"
    )
    sub.add_argument(
        "--search-windows",
        type=int,
        default=8,
        metavar="N",
        help="calibration windows on which searches and sweeps evaluate",
    )
    add_evaluation(sub)
    sub.add_argument(
        "--restart",
        action="store_true",
        help="forget what an interrupted call left in OUTPUT.journal",
    )
    add_output(sub, "new directory for compare.html, .csv, .json, plots, scores.json and plans/")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff compare`."""
    from simdiff.comparison.compare import ComparisonOptions
    from simdiff.jobs.compare import run_comparison
    from simdiff.report.terminal.tables import comparison_table

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
            search_windows=arguments.search_windows,
            evaluation_windows=arguments.evaluation_windows,
        ),
        held_out_source=arguments.held_out,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    output: Path = arguments.output
    show(
        arguments,
        {**comparison.to_dict(), "output": str(output)},
        comparison_table(comparison),
        f"Table:  {output / 'compare.csv'}",
        f"Report: {output / 'compare.html'}",
    )
