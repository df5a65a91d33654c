"""Read tensors of safetensors files by plain reads into memory that is used again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.io.safetensors_header import StoredTensor

Stamp: TypeAlias = tuple[int, int, int]
"""Size, time of the last change in nanoseconds, and inode of a file."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of safetensors that torch has."""

# Kernels choose their ways, and so the last bits of a result, by where a tensor begins in a line of
# the cache. The stock loader maps files into memory, where a tensor begins as it does in its file.
LINE = 64
# Several reads at a time are what a fast disk needs: one thread of plain reads stays below 2 GB/s.
_READERS = 4
_PIECE_BYTES = 16 << 20


def stamp(path: Path) -> Stamp:
    """What tells whether a file has changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


class TensorReader:
    """Reads groups of tensors one after the other; their files must not change meanwhile.

    Args:
        files: all files that will be read; how they are now is how they must stay.
        pinned: whether the memory is pinned, from which a GPU copies while it computes.

    Two buffers serve all groups in turn, so the tensors of a group are valid until the second next
    one is read.
    """

    def __init__(self, files: Iterable[Path], *, pinned: bool = False) -> None:
        """Note how the files are now."""
        self.stamps: dict[Path, Stamp] = {path: stamp(path) for path in files}
        self.bytes_read = 0
        """Bytes read so far."""
        self._pinned = pinned
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def read(self, tensors: Sequence[StoredTensor]) -> dict[str, Tensor]:
        """The tensors by name, read once and whole.

        Raises:
            SimdiffError: a file has changed since the beginning or while it was read.
        """
        starts, total = _places(tensors)
        buffer = self._buffer(total)
        memory = {
            tensor.name: buffer[start : start + tensor.num_bytes]
            for tensor, start in zip(tensors, starts, strict=True)
        }
        self._check({tensor.path for tensor in tensors})
        pieces = [piece for tensor in tensors for piece in _pieces(tensor, memory[tensor.name])]
        with ThreadPoolExecutor(_READERS) as readers:
            for count in readers.map(_read_piece, pieces):
                self.bytes_read += count
        self._check({tensor.path for tensor in tensors})
        return {
            tensor.name: memory[tensor.name].view(DTYPES[tensor.dtype]).view(tensor.shape)
            for tensor in tensors
        }

    def _buffer(self, num_bytes: int) -> Tensor:
        """Memory that begins with a line of the cache."""
        wanted = num_bytes + LINE
        self._buffers.reverse()
        if self._buffers[0].numel() < wanted:
            self._buffers[0] = torch.empty(0, dtype=torch.uint8)  # freed before the next is there
            self._buffers[0] = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pinned)
        return _from_line(self._buffers[0])

    def _check(self, files: Iterable[Path]) -> None:
        for path in files:
            try:
                found: Stamp | None = stamp(path)
            except OSError:
                found = None
            if found != self.stamps[path]:
                what = "is gone" if found is None else "has changed"
                raise SimdiffError(
                    f"{path}: must stay as it is while its weights are streamed, and {what}: start "
                    "again when nothing writes to it any more"
                )


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU, to read into or to write from."""
    return memoryview(tensor.numpy().data)


def _places(tensors: Sequence[StoredTensor]) -> tuple[list[int], int]:
    """Where each tensor begins in a buffer, as in its file within a line, and the bytes of all."""
    starts, end = [], 0
    for tensor in tensors:
        apart = tensor.start % LINE if tensor.start % DTYPES[tensor.dtype].itemsize == 0 else 0
        starts.append(end + (apart - end) % LINE)
        end = starts[-1] + tensor.num_bytes
    return starts, end


def _from_line(buffer: Tensor) -> Tensor:
    return buffer[-buffer.data_ptr() % LINE :]


def _pieces(tensor: StoredTensor, target: Tensor) -> Iterator[tuple[Path, int, Any]]:
    """A tensor as pieces that are read at once: file, offset, memory."""
    view = bytes_of(target)
    for start in range(0, tensor.num_bytes, _PIECE_BYTES):
        yield tensor.path, tensor.start + start, view[start : start + _PIECE_BYTES]


def _read_piece(piece: tuple[Path, int, Any]) -> int:
    path, offset, view = piece
    wanted = len(view)
    try:
        with path.open("rb", buffering=0) as file:
            while view:
                count = os.preadv(file.fileno(), [view], offset)
                if not count:
                    raise SimdiffError(f"{path}: became shorter while it was read")
                view, offset = view[count:], offset + count
    except OSError as error:
        raise SimdiffError(f"{path}: cannot be read: {error.strerror}") from None
    return wanted
