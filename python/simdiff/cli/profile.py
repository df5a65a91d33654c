"""`simdiff profile`."""

from __future__ import annotations

import argparse

from simdiff.cli.options import add_model, add_output, add_text, show, text_options
from simdiff.cli.parsing import CommandParser

TEXT = "Time and memory of a calibration pass, layer by layer."


def add(sub: CommandParser) -> None:
    """The options of `simdiff profile`."""
    add_model(sub)
    add_text(sub, num_windows=8)
    add_output(sub, "trace to write, .json or .json.gz; Perfetto opens it")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff profile`."""
    from simdiff.io.outputs import check_new_file
    from simdiff.models.loading import load_model
    from simdiff.report.terminal.tables import profile_table
    from simdiff.scoring.profiling import profile_pass

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    text = text_options(arguments)
    text.check()
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = text.windows(tokenizer, "calibration")
    batches = windows.batches(arguments.batch_size)
    result = profile_pass(model, batches, arguments.output, overwrite=arguments.overwrite)
    show(
        arguments,
        {**result.to_dict(), "trace": str(arguments.output)},
        profile_table(result),
        f"Trace: {arguments.output} (open it in https://ui.perfetto.dev)",
    )
