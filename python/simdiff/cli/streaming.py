"""Options of the commands that run models larger than memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.parsing import CommandParser, rare

if TYPE_CHECKING:
    from simdiff.models.streamed import StreamOptions


def add_stream(sub: CommandParser) -> None:
    """Whether the layers of the model are loaded one at a time, and where its states lie."""
    group = sub.group("model")
    rare(
        group,
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="load the layers one at a time from the safetensors files, each once per pass "
        "(default: where the weights do not fit into memory)",
    )
    rare(
        group,
        "--stream-memory",
        metavar="SIZE",
        help="most that the hidden states of all windows may take in memory while the model is "
        "streamed, in bytes or such as 4GB; the others lie in the folder (default: 2 GiB)",
    )
    rare(
        group,
        "--offload-folder",
        type=Path,
        metavar="DIR",
        help="new folder for those states, from which an interrupted command goes on; it is "
        "removed at the end (default: OUTPUT.states, beside the output)",
    )


def stream_options(arguments: argparse.Namespace) -> StreamOptions | None:
    """What `add_stream` asked for; None with --no-stream."""
    from simdiff.checkpoints.shards import parse_size
    from simdiff.cli.output import on_standard_output
    from simdiff.models.streamed import DEFAULT_MEMORY, StreamOptions

    if arguments.stream is False:
        return None
    folder, output = arguments.offload_folder, arguments.output
    if folder is None and output is not None and not on_standard_output(arguments):
        folder = output.absolute().with_name(output.name + ".states")
    size = arguments.stream_memory
    memory = DEFAULT_MEMORY if size is None else parse_size(size)
    return StreamOptions(memory, folder, always=bool(arguments.stream))
