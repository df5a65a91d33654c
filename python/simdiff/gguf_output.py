"""A GGUF file that appears whole or not at all, its tensors copied from other ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from simdiff.errors import SimdiffError
from simdiff.files import check_new_file
from simdiff.gguf_format import GgufFile, TensorRecord, align, header, tensor_record

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Piece:
    """A tensor of the output: its name there, and where its data lies."""

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
    """Write a GGUF file beside its name, check it, and let it appear.

    Args:
        output: where it appears.
        first: gives version and alignment.
        entries: the metadata, as bytes.
        pieces: the tensors, in order.
        overwrite: replace an earlier output.

    Returns:
        The number of bytes.

    Raises:
        SimdiffError: no space, no permission, an input that changes, an output that exists.
    """
    offsets, position = [], 0
    for piece in pieces:
        offsets.append(position)
        position = align(position + piece.tensor.num_bytes, first.alignment)
    head = b"".join(
        [
            header(first.version, len(pieces), len(entries)),
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
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{output.name}.partial-", dir=output.parent)
    except OSError as error:
        raise SimdiffError(f"output {output}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(head)
            _copy(pieces, file, first.alignment)
            file.flush()
            os.fsync(file.fileno())
        _check(Path(scratch), entries, pieces)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        check_new_file(output, overwrite)  # somebody may have made it in the meantime
        os.replace(scratch, output)
    except OSError as error:
        raise SimdiffError(f"output {output}: cannot be written: {error.strerror}") from None
    finally:
        Path(scratch).unlink(missing_ok=True)
    _sync_directory(output.parent)
    return num_bytes


def _copy(pieces: Iterable[Piece], target: BinaryIO, alignment: int) -> None:
    # Read through file handles: pages of a mapping count as memory of this process, and a file
    # that gets shorter meanwhile would end it with SIGBUS.
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
    """Read back what was written: a file that is not what was meant must not get its name."""
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


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
