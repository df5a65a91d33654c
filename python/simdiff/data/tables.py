"""Columns of Parquet and Arrow files, read by pyarrow where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from simdiff.data.hub import column_in
from simdiff.errors import SimdiffError

_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"


def read_table(file: BinaryIO, name: str, column: str) -> tuple[list[str], Iterator[Any]]:
    """The names of the columns of a file, and the values of one, batch by batch.

    Args:
        file: Parquet, or Arrow of either form: a file or a stream.
        name: of the file, for messages.
        column: one of the names, see `column_in`; else the values must not be asked for.

    Raises:
        SimdiffError: pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise SimdiffError(
            f"text {name}: Parquet and Arrow files are read with pyarrow, which is not installed: "
            "pip install pyarrow, or give the text as JSON Lines"
        ) from None
    start = file.read(len(_ARROW_FILE))
    file.seek(0)
    try:
        if start.startswith(_PARQUET):
            whole = pyarrow.parquet.ParquetFile(file)
            names = whole.schema_arrow.names
            batches = whole.iter_batches(1024, columns=[column_in(names, column) or column])
        elif start == _ARROW_FILE:
            whole = pyarrow.ipc.open_file(file)
            batches = map(whole.get_batch, range(whole.num_record_batches))
            names = whole.schema.names
        else:
            batches = pyarrow.ipc.open_stream(file)
            names = batches.schema.names
    except pyarrow.ArrowException as error:
        raise _damaged(name, error) from None

    def values() -> Iterator[Any]:
        try:
            for batch in batches:
                yield from batch.column(column_in(names, column) or column).to_pylist()
        except pyarrow.ArrowException as error:
            raise _damaged(name, error) from None

    return names, values()


def _damaged(name: str, error: Exception) -> SimdiffError:
    return SimdiffError(f"text {name}: cannot be read: {' '.join(str(error).split())}")
