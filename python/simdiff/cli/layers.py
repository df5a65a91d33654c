"""Which layers go: a plan's, or those named by hand. Options of every command that takes a plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.parsing import CommandParser, layer_list
from simdiff.errors import SimdiffError

if TYPE_CHECKING:
    from simdiff.planning.plan import PruningPlan


def add_plan_source(sub: CommandParser, title: str, text: str = "") -> None:
    """Which layers go: a plan's, or those named by hand; `text` ends the help of `--plan`."""
    group = sub.group(title).add_mutually_exclusive_group()
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="file written by `simdiff plan`, or a list of layers such as `simdiff export --format "
        f"list` writes{text}",
    )
    group.add_argument(
        "--remove",
        type=layer_list,
        metavar="LAYERS",
        help="the layers themselves, such as 2,3,8-10 (counted from 0)",
    )


def plan_source(arguments: argparse.Namespace) -> PruningPlan:
    """What `add_plan_source` asked for.

    Raises:
        SimdiffError: neither or both, or no such plan.
    """
    from simdiff.planning.plan import PruningPlan

    if (arguments.plan is None) == (arguments.remove is None):
        got = "neither" if arguments.plan is None else "both"
        raise SimdiffError(
            "--plan (a plan.json, or a list of layers) or --remove (such as 2,3,8-10) must say "
            f"which layers go, got {got}"
        )
    if arguments.plan is not None:
        return PruningPlan.load(arguments.plan)
    return PruningPlan(arguments.remove)
