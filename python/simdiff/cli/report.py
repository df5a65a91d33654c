"""`simdiff report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_output
from simdiff.cli.output import show, write_output
from simdiff.cli.parsing import CommandParser

TEXT = "One page of a run, a recovery, a comparison, a benchmark, or of several of them."


def add(sub: CommandParser) -> None:
    """The options of `simdiff report`."""
    sub.add_argument(
        "source",
        type=Path,
        metavar="PATH",
        help="directory that `simdiff run`, `prune`, `recover` or `compare` wrote, or a file of "
        "`simdiff bench` or `eval`",
    )
    group = sub.group("more to report")
    group.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="file of `simdiff eval --output` (default: evaluation.json in the directory, if "
        "there)",
    )
    group.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="file of `simdiff bench --output` (default: bench.json in the directory, if there)",
    )
    group.add_argument(
        "--recovery",
        type=Path,
        metavar="PATH",
        help="directory of `simdiff recover`, or its recovery.json (default: that in the "
        "directory, if there)",
    )
    group.add_argument(
        "--comparison", type=Path, metavar="PATH", help="directory of `simdiff compare`"
    )
    add_output(sub, "new file, such as report.html; - is standard output")


def needs_torch(arguments: argparse.Namespace) -> bool:
    """A page is made of files."""
    return False


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff report`."""
    from simdiff.report.page import render_page
    from simdiff.report.sources import read_sources

    output: Path = arguments.output
    sources = read_sources(
        arguments.source,
        evaluation=arguments.evaluation,
        bench=arguments.bench,
        recovery=arguments.recovery,
        comparison=arguments.comparison,
        page=output,
    )
    write_output(arguments, render_page(sources))
    parts = ("plan", "scores", "results", "evaluation", "bench", "recovery", "comparison")
    found = [part for part in parts if getattr(sources, part) is not None]
    show(
        arguments,
        {"output": str(output), "from": found},
        f"Report: {output}, from {', '.join(found)}",
    )
