"""Read tensors of safetensors files by plain reads into memory that is used again."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeAlias

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
# Bytes that are read and then cast while they are in the cache, and elements that are cast at once:
# of fewer than 32768 torch's own threads take none, which the layer that computes meanwhile needs.
_CAST_BYTES = 1 << 20
_CAST_ELEMENTS = 1 << 14


def stamp(path: Path) -> Stamp:
    """What tells whether a file has changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


class TensorReader:
    """Reads groups of tensors one after the other; their files must not change meanwhile.

    Args:
        files: all files that will be read; how they are now is how they must stay.
        pinned: whether the memory is pinned, from which a GPU copies while it computes.
        dtypes: to which tensors are cast as they are read, by their names; others stay as stored.

    Two buffers serve all groups in turn, so the tensors of a group are valid until the second next
    one is read.
    """

    def __init__(
        self,
        files: Iterable[Path],
        *,
        pinned: bool = False,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Note how the files are now."""
        self.stamps: dict[Path, Stamp] = {path: stamp(path) for path in files}
        self.bytes_read = 0
        """Bytes read so far."""
        self._pinned = pinned
        self._dtypes = dict(dtypes or {})
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def read(self, tensors: Sequence[StoredTensor]) -> dict[str, Tensor]:
        """The tensors by name, read once and whole.

        Raises:
            SimdiffError: a file has changed since the beginning or while it was read.
        """
        dtypes = [self._dtypes.get(one.name, DTYPES[one.dtype]) for one in tensors]
        starts, total = _places(tensors, dtypes)
        buffer = self._buffer(total)
        memory = {
            tensor.name: buffer[start : start + math.prod(tensor.shape) * dtype.itemsize]
            .view(dtype)
            .view(tensor.shape)
            for tensor, dtype, start in zip(tensors, dtypes, starts, strict=True)
        }
        self._check({tensor.path for tensor in tensors})
        pieces = [piece for tensor in tensors for piece in _pieces(tensor, memory[tensor.name])]
        for count in _read_pieces(pieces):
            self.bytes_read += count
        self._check({tensor.path for tensor in tensors})
        return memory

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


def _places(
    tensors: Sequence[StoredTensor], dtypes: Sequence[torch.dtype]
) -> tuple[list[int], int]:
    """Where each tensor begins in a buffer, as in its file within a line, and the bytes of all.

    One that is cast begins with a line: there the stock loader takes new memory for it.
    """
    starts, end = [], 0
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        mapped = dtype == DTYPES[tensor.dtype] and tensor.start % dtype.itemsize == 0
        starts.append(end + ((tensor.start if mapped else 0) - end) % LINE)
        end = starts[-1] + math.prod(tensor.shape) * dtype.itemsize
    return starts, end


def _from_line(buffer: Tensor) -> Tensor:
    return buffer[-buffer.data_ptr() % LINE :]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of a tensor that is read at once."""

    path: Path
    offset: int
    num_bytes: int
    stored: torch.dtype
    target: Tensor
    """The elements in memory, flat."""


def _pieces(tensor: StoredTensor, target: Tensor) -> Iterator[_Piece]:
    """A tensor as pieces that are read at once."""
    dtype = DTYPES[tensor.dtype]
    flat, most = target.view(-1), _PIECE_BYTES // dtype.itemsize
    for start in range(0, flat.numel(), most):
        part = flat[start : start + most]
        offset = tensor.start + start * dtype.itemsize
        yield _Piece(tensor.path, offset, part.numel() * dtype.itemsize, dtype, part)


def _read_pieces(pieces: Sequence[_Piece]) -> Iterator[int]:
    """Read pieces, several at a time if there is more than one piece of the usual size."""
    if sum(piece.num_bytes for piece in pieces) <= _PIECE_BYTES:
        yield from map(_read_piece, pieces)
        return
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(_read_piece, pieces)


def _read_piece(piece: _Piece) -> int:
    try:
        with piece.path.open("rb", buffering=0) as file:
            if piece.target.dtype == piece.stored:
                _fill(file, piece, piece.offset, bytes_of(piece.target.view(torch.uint8)))
            else:
                _cast(file, piece)
    except OSError as error:
        raise SimdiffError(f"{piece.path}: cannot be read: {error.strerror}") from None
    return piece.num_bytes


def _cast(file: BinaryIO, piece: _Piece) -> None:
    """Read a piece through a buffer that stays in the cache."""
    most = _CAST_BYTES // piece.stored.itemsize
    buffer = torch.empty(min(most, piece.target.numel()), dtype=piece.stored)
    for start in range(0, piece.target.numel(), most):
        part = piece.target[start : start + most]
        read = buffer[: part.numel()]
        offset = piece.offset + start * piece.stored.itemsize
        _fill(file, piece, offset, bytes_of(read.view(torch.uint8)))
        for some, target in zip(
            read.split(_CAST_ELEMENTS), part.split(_CAST_ELEMENTS), strict=True
        ):
            target.copy_(some)


def _fill(file: BinaryIO, piece: _Piece, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if not count:
            raise SimdiffError(f"{piece.path}: became shorter while it was read")
        view, offset = view[count:], offset + count
