"""Read and write headers of safetensors files without reading any weights.

Layout of a file (https://github.com/huggingface/safetensors): the header's length as a
little-endian uint64, the header as JSON padded with spaces to a multiple of 8 bytes, then the
tensors' bytes without holes, at the offsets in the header. Reading them does not load torch.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import parse_json

# Bits per entry of each dtype. safetensors 0.8 stores tensors in the reverse order of this table.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_ORDER = {dtype: position for position, dtype in enumerate(DTYPE_BITS)}
# The limit of the safetensors library: a longer header means damage or an attack.
MAX_HEADER_BYTES = 100_000_000
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor on disk, with its dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    """Offset of the first byte from the start of the file."""
    num_bytes: int


def file_order(tensor: tuple[str, StoredTensor]) -> tuple[int, str]:
    """Sort key of (name, tensor) for the order in a file: wide dtypes first, then by name."""
    return -_ORDER[tensor[1].dtype], tensor[0]


def read_header(path: Path) -> tuple[dict[str, str], list[StoredTensor]]:
    """Read the metadata and the tensors of a file, in the order of their bytes.

    Raises:
        SimdiffError: the file is truncated, damaged, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header, data_start = _read_json(path, file.read(8), size, file)
    except OSError as error:
        raise SimdiffError(
            f"{path}: must be a readable safetensors file: {error.strerror}"
        ) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SimdiffError(f"{path}: __metadata__ of the header must map names to strings")
    tensors = [_entry(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    _check_offsets(path, tensors, data_start, size)
    return metadata, tensors


def _read_json(path: Path, prefix: bytes, size: int, file: Any) -> tuple[dict[str, Any], int]:
    if len(prefix) < 8:
        raise SimdiffError(
            f"{path}: must be a safetensors file of at least 8 bytes, got {size}; {_AGAIN}"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise SimdiffError(
            f"{path}: the header of a safetensors file must have at most {MAX_HEADER_BYTES:,} "
            f"bytes, but its first 8 bytes say {length:,}: this is another kind of file, or "
            f"damaged; {_AGAIN}"
        )
    if 8 + length > size:
        raise SimdiffError(
            f"{path}: truncated: the header must have {length:,} bytes, but the file ends after "
            f"{size - 8:,} of them; {_AGAIN}"
        )
    try:
        header = parse_json(file.read(length).decode(), _unique)
    except ValueError as error:
        raise SimdiffError(
            f"{path}: the header must be JSON, but is not: {error}; {_AGAIN}"
        ) from None
    if not isinstance(header, dict):
        raise SimdiffError(f"{path}: the header must be a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        # Sorted, a name that comes twice stands beside itself.
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, other in itertools.pairwise(names) if name == other)
        raise ValueError(f"it names {twice!r} twice")
    return result


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        lists = isinstance(shape, list) and isinstance(entry["data_offsets"], list)
        if not lists or not all(map(_is_count, [*shape, first, end])):
            raise ValueError("shape and data_offsets must be whole numbers from 0")
        known = dtype in DTYPE_BITS
    except (KeyError, TypeError, ValueError) as error:
        raise SimdiffError(
            f"{path}: tensor {name!r} must have dtype, shape and data_offsets, got "
            f"{json.dumps(entry)[:200]} ({type(error).__name__}: {error})"
        ) from None
    if not known:
        raise SimdiffError(
            f"{path}: tensor {name!r} must have one of the dtypes {', '.join(DTYPE_BITS)}, "
            f"got {dtype!r}"
        )
    wanted = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
    if end - first != wanted:
        raise SimdiffError(
            f"{path}: tensor {name!r} must take {wanted:,} bytes ({dtype}, shape {shape}), but its "
            f"data_offsets [{first}, {end}] span {end - first:,}; {_AGAIN}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_start + first, wanted)


def _check_offsets(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Check that tensors follow each other without overlap or hole and end with the file."""
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "follows a hole"
            raise SimdiffError(
                f"{path}: the tensors must lie back to back, but {tensor.name!r} {what}: it must "
                f"start at byte {end - data_start} of the data, got {tensor.start - data_start}; "
                f"{_AGAIN}"
            )
        end += tensor.num_bytes
    if end != size:
        what = "truncated" if end > size else "too long"
        raise SimdiffError(
            f"{path}: {what}: its header says {end:,} bytes, the file has {size:,}; {_AGAIN}"
        )


def header_bytes(
    tensors: Iterable[tuple[str, StoredTensor]], metadata: dict[str, str]
) -> tuple[bytes, int]:
    """The start of a file with these tensors, byte for byte as the safetensors library writes it.

    Args:
        tensors: new name and tensor, in `file_order`.
        metadata: metadata of the file.

    Returns:
        The bytes before the data, and the number of bytes of the data.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.num_bytes),
        }
        offset += tensor.num_bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def total_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Total number of bytes of some tensors."""
    return sum(tensor.num_bytes for tensor in tensors)
