"""`simdiff report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import show

TEXT = "One page of a run's files and, where given, of its evaluation, benchmark and recovery."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff report`."""
    sub.add_argument(
        "directory", type=Path, help="directory that `simdiff run`, `prune` or `recover` wrote"
    )
    sub.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="file of `simdiff eval --output` (default: evaluation.json in the "
        "directory, if there)",
    )
    sub.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="file of `simdiff bench --output` (default: bench.json in the directory, if there)",
    )
    sub.add_argument(
        "--recovery",
        type=Path,
        metavar="PATH",
        help="directory of `simdiff recover`, or its recovery.json (default: that in "
        "the directory, if there)",
    )
    sub.add_argument(
        "--output", "-o", type=Path, required=True, help="new file, such as report.html"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff report`."""
    from simdiff.io.outputs import check_new_file, write_bytes
    from simdiff.report.page import render_page
    from simdiff.report.sources import read_sources

    output: Path = arguments.output
    check_new_file(output.absolute(), arguments.overwrite)
    sources = read_sources(
        arguments.directory,
        evaluation=arguments.evaluation,
        bench=arguments.bench,
        recovery=arguments.recovery,
    )
    write_bytes(output, render_page(sources).encode())
    parts = ("scores", "results", "evaluation", "bench", "recovery")
    found = ["plan", *(part for part in parts if getattr(sources, part) is not None)]
    show(
        arguments,
        {"output": str(output), "from": found},
        f"Report: {output}, from {', '.join(found)}",
    )
