"""`simdiff eval`."""

from __future__ import annotations

import argparse

from simdiff.cli.options import add_model, add_text, show, text_options

TEXT = "Perplexity of one or more models on the same text."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff eval`."""
    add_model(sub, several=True)
    add_text(sub)
    sub.add_argument("--part", choices=("held-out", "calibration", "all"), default="held-out",
                     help="part of the text; `score` does not read held-out")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff eval`."""
    from simdiff.pipeline import evaluate
    from simdiff.tables import evaluation_table

    results = evaluate(
        arguments.models,
        text=text_options(arguments),
        part=arguments.part,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    show(arguments, results, evaluation_table(results))
