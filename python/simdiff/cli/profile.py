"""`simdiff profile`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from simdiff.cli.options import add_model, add_output, add_text, text_of, text_options
from simdiff.cli.output import on_standard_output, show
from simdiff.cli.parsing import CommandParser

TEXT = "Time and memory of a calibration pass, layer by layer."


def add(sub: CommandParser) -> None:
    """The options of `simdiff profile`."""
    add_model(sub)
    add_text(sub, num_windows=8)
    add_output(sub, "trace to write, .json or .json.gz; Perfetto opens it; - is standard output")


def check(arguments: argparse.Namespace) -> None:
    """Refuse a model of the user's own without a text."""
    text_of(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff profile`."""
    from simdiff.models.loading import load_model
    from simdiff.report.terminal.tables import profile_table
    from simdiff.scoring.profiling import profile_pass

    text = text_options(arguments)
    text.check()
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = text.windows(tokenizer, "calibration")
    batches = windows.batches(arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        whole = on_standard_output(arguments)
        trace = Path(folder, "trace.json") if whole else arguments.output
        result = profile_pass(model, batches, trace, overwrite=arguments.overwrite)
        if whole:
            print(trace.read_text(), end="")
    show(
        arguments,
        {**result.to_dict(), "trace": str(arguments.output)},
        profile_table(result),
        f"Trace: {arguments.output} (open it in https://ui.perfetto.dev)",
    )
