"""`simdiff verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.options import add_threads
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser
from simdiff.errors import number_of

TEXT = "Check that a pruned directory is whole, loads in stock tools, and is what its plan says."


def add(sub: CommandParser) -> None:
    """The options of `simdiff verify`."""
    sub.add_argument(
        "directory",
        type=Path,
        metavar="DIRECTORY",
        help="directory written by `simdiff prune`, or any checkpoint",
    )
    group = sub.group("model")
    group.add_argument(
        "--against",
        metavar="MODEL",
        help="the model before pruning: logits must be those of the plan applied to it in memory",
    )
    add_threads(group)
    sub.epilog = "exit codes: 0 every check held, 1 some check failed, 2 nothing to check"


def run(arguments: argparse.Namespace) -> int:
    """Run `simdiff verify`; returns its exit code."""
    from dataclasses import asdict

    from simdiff.provenance.verify import verify

    checks = verify(arguments.directory, arguments.against)
    failed = sum(check.passed is False for check in checks)
    if arguments.json:
        content = {
            "directory": str(arguments.directory),
            "against": arguments.against,
            "ok": not failed,
            "checks": [asdict(check) for check in checks],
        }
        show(arguments, content)
    else:  # plain lines: one for each check, however long
        print(*(check.line() for check in checks), sep="\n")
        held = sum(check.passed is True for check in checks)
        print(
            f"{arguments.directory}: {held} of {number_of(len(checks), 'check')} held, "
            f"{failed} failed"
        )
    return 1 if failed else 0
