"""The option `--log` of commands that trackers can be told of."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from simdiff.cli.config import given_options
from simdiff.cli.parsing import CommandParser, names, rare

if TYPE_CHECKING:
    from simdiff.io.trackers import Log


def add_log(sub: CommandParser) -> None:
    """Which trackers are told what the command finds."""
    rare(
        sub.group("output"),
        "--log",
        type=names,
        default=(),
        metavar="NAMES",
        help="trackers that get losses, plans, tables and the report: trackio, wandb, mlflow, "
        "tensorboard (files in OUTPUT.tensorboard)",
    )


def log_of(arguments: argparse.Namespace) -> AbstractContextManager[Log]:
    """The trackers of `--log`, started."""
    from simdiff.io.trackers import tracked

    return tracked(arguments.log, arguments.output, given_options(arguments))
