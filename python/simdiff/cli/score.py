"""`simdiff score`."""

from __future__ import annotations

import argparse

from simdiff.cli.options import add_model, add_output, add_text, show, text_options

TEXT = "Score every layer on calibration text; write scores.json."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff score`."""
    add_model(sub)
    add_text(sub)
    sub.add_argument("--sublayers", action="store_true", help="also score the attention and the "
                     "MLP of every layer, for `simdiff plan --unit`")  # fmt: skip
    add_output(sub, "file to write, such as scores.json")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff score`."""
    from simdiff.files import check_new_file
    from simdiff.models import load_model
    from simdiff.scores import score
    from simdiff.sublayer_scores import score_with_sublayers
    from simdiff.sublayer_tables import sublayers_table
    from simdiff.tables import scores_table

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = text_options(arguments).windows(tokenizer, "calibration")
    scores = (score_with_sublayers if arguments.sublayers else score)(
        model,
        windows.batches(arguments.batch_size),
        name=arguments.model,
        calibration=windows.identity.to_dict(),
    )
    scores.save(arguments.output)
    tables = [scores_table(scores), *([sublayers_table(scores)] if arguments.sublayers else [])]
    show(arguments, scores.to_dict(), *tables, f"Scores: {arguments.output}")
