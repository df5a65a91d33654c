"""`simdiff rerun`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from simdiff.cli.options import add_output
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser

TEXT = "Give the command of an earlier output again; says what differs today."
INTERRUPTED = "as the command that was given again says"


def add(sub: CommandParser) -> None:
    """The options of `simdiff rerun`."""
    sub.add_argument(
        "directory",
        type=Path,
        metavar="DIRECTORY",
        help="directory that `simdiff run`, `prune`, `recover` or `compare` wrote; relative paths "
        "in its config.yaml are seen from here",
    )
    add_output(sub, "new directory for what the command writes")


def check(arguments: argparse.Namespace) -> None:
    """Refuse a directory without the command that wrote it."""
    from simdiff.provenance.rerun import command_of

    command_of(arguments.directory)


def repeat(arguments: argparse.Namespace, main: Callable[[Sequence[str]], int]) -> int:
    """Run the command by its config.yaml, then compare the two outputs.

    Args:
        arguments: of `simdiff rerun`.
        main: runs the words of a command line and returns the exit code.
    """
    from simdiff.io import ranks
    from simdiff.io.kinds import CONFIG
    from simdiff.provenance.rerun import command_of, compared

    command = command_of(arguments.directory)
    words = [command, "--config", arguments.directory / CONFIG, "--output", arguments.output]
    words += [f"--{name}" for name in ("overwrite", "quiet", "verbose") if vars(arguments)[name]]
    # What the command prints is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        code = main([str(word) for word in words])
    if code or ranks.announced()[0]:
        return code
    found = compared(arguments.directory, arguments.output)
    content = {
        "command": command,
        "output": str(arguments.output),
        "same": found.same,
        "circumstances": found.circumstances,
        "results": found.results,
    }
    show(arguments, content, "", *found.lines())
    return 0
