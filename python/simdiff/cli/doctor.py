"""`simdiff doctor`."""

from __future__ import annotations

import argparse

from simdiff.cli.options import add_model
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser

TEXT = "What can be done with a model, and why not: scored, cut, recovered, exported."


def add(sub: CommandParser) -> None:
    """The options of `simdiff doctor`."""
    add_model(sub)
    sub.epilog = (
        "The same checks that the commands make; the weights are loaded, nothing is written. A "
        "GGUF file and the directory of an adapter are told apart too. exit codes: 0 the model "
        "can be scored and cut, 1 it cannot, 2 there is no such model"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `simdiff doctor`; returns its exit code."""
    from simdiff.jobs.doctor import diagnose

    found = diagnose(arguments.model, dtype=arguments.dtype, device=arguments.device)
    if arguments.json:
        show(arguments, found.to_dict())
    else:  # plain lines: one for each finding, however long
        print(f"{found.model}: {found.what}")
        print(*(finding.line() for finding in found.findings), sep="\n")
        print(f"{found.model} {'can' if found.ok else 'cannot'} be scored and cut")
    return 0 if found.ok else 1
