"""`simdiff score`."""

from __future__ import annotations

import argparse

from simdiff.cli.options import add_model, add_output, add_text, show, text_options

TEXT = "Score every layer on calibration text; write scores.json."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff score`."""
    add_model(sub)
    add_text(sub)
    add_output(sub, "file to write, such as scores.json")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff score`."""
    from simdiff.files import check_new_file
    from simdiff.models import load_model
    from simdiff.scores import score
    from simdiff.tables import scores_table

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = text_options(arguments).windows(tokenizer, "calibration")
    scores = score(
        model,
        windows.batches(arguments.batch_size),
        name=arguments.model,
        calibration=windows.identity.to_dict(),
    )
    scores.save(arguments.output)
    show(arguments, scores.to_dict(), scores_table(scores), f"Scores: {arguments.output}")
