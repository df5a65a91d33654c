"""Write a GGUF file, whole or not at all, with tensors copied from other GGUF files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from simdiff.checkpoints.gguf.container import (
    GgufFile,
    TensorRecord,
    align,
    file_header,
    tensor_record,
)
from simdiff.errors import SimdiffError
from simdiff.io.kinds import Kind
from simdiff.io.outputs import new_file

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Piece:
    """A tensor of the output: its new name, and the file and record of its data."""

    source: GgufFile
    tensor: TensorRecord
    name: str


def write_gguf(
    output: Path,
    first: GgufFile,
    entries: Sequence[bytes],
    pieces: Sequence[Piece],
    overwrite: bool,
) -> int:
    """Write a GGUF file under a temporary name, check it, and rename it to `output`.

    Args:
        output: path of the file.
        first: the file whose version and alignment are used.
        entries: the metadata entries, as bytes.
        pieces: the tensors, in order.
        overwrite: replace an earlier output.

    Returns:
        The size of the file in bytes.

    Raises:
        SimdiffError: there is no space or no permission, an input changes, or the output exists.
    """
    offsets, position = [], 0
    for piece in pieces:
        offsets.append(position)
        position = align(position + piece.tensor.num_bytes, first.alignment)
    head = b"".join(
        [
            file_header(first.version, len(pieces), len(entries)),
            *entries,
            *(tensor_record(p.tensor, p.name, o) for p, o in zip(pieces, offsets, strict=True)),
        ]
    )
    head += bytes(align(len(head), first.alignment) - len(head))
    num_bytes = len(head) + position
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise SimdiffError(
            f"output {output}: needs {num_bytes / 1e9:.2f} GB, but {output.parent} has "
            f"{free / 1e9:.2f} GB free"
        )
    with new_file(output, overwrite, Kind.GGUF) as scratch:
        with scratch.open("wb") as file:
            file.write(head)
            _copy(pieces, file, first.alignment)
        _check(scratch, entries, pieces)
    return num_bytes


def _copy(pieces: Iterable[Piece], target: BinaryIO, alignment: int) -> None:
    # Data are read through file handles: pages of a mapping count as memory of this process, and a
    # file that becomes shorter meanwhile would end the process with SIGBUS.
    handles: dict[Path, BinaryIO] = {}
    buffer = memoryview(bytearray(_CHUNK))
    try:
        for piece in pieces:
            path = piece.source.path
            if path not in handles:
                handles[path] = path.open("rb")
            handles[path].seek(piece.tensor.offset)
            left = piece.tensor.num_bytes
            while left:
                count = handles[path].readinto(buffer[: min(left, _CHUNK)])  # type: ignore[attr-defined]
                if not count:
                    raise SimdiffError(f"{path}: got shorter while it was read")
                target.write(buffer[:count])
                left -= count
            size = piece.tensor.num_bytes
            target.write(bytes(align(size, alignment) - size))
    finally:
        for file in handles.values():
            file.close()


def _check(path: Path, entries: Sequence[bytes], pieces: Sequence[Piece]) -> None:
    """Read the written file back, so that a wrong one is not renamed to the output."""
    written = GgufFile(path)
    try:
        wanted = [(p.name, p.tensor.shape, p.tensor.kind, p.tensor.num_bytes) for p in pieces]
        found = [(t.name, t.shape, t.kind, t.num_bytes) for t in written.tensors]
        same = [written.raw(entry) for entry in written.entries.values()] == list(entries)
        if not same or found != wanted:
            raise SimdiffError(
                f"{path}: what was read back is not what was written; the disk or the memory may "
                "be faulty"
            )
    finally:
        written.close()
