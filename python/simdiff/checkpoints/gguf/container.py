"""The GGUF container: find the place of every metadata entry and every tensor in a file.

`gguf.GGUFReader` makes several Python objects for every token of the vocabulary (160 MB and 4 s for
49,152 tokens) and returns values, while cutting a file needs the bytes themselves. Names of keys,
types and sizes of quantised groups come from the `gguf` package.

Format: header (magic, version, number of tensors, number of entries), entries (key, type, value),
tensor records (name, shape, type, offset), padding, tensor data; all little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
# The `struct` format of each type of value, by the type's number in the file.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
# Of arrays in arrays, of which no file known to us has any.
MAX_DEPTH = 16


@dataclass(frozen=True)
class Entry:
    """A metadata entry: offsets of the whole entry (start, end) and of its value."""

    key: str
    kind: int
    element: int
    """Type of an array's elements; the same as `kind` for other values."""
    count: int
    """Number of an array's elements; 1 for other values."""
    start: int
    value: int
    end: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor record; the shape is in ggml's order, the fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """Offset of the tensor's data from the start of the file."""
    num_bytes: int


class GgufFile:
    """A GGUF file, mapped into memory; only the parts that are accessed are read.

    Raises:
        SimdiffError: the file is not GGUF, is big-endian, of an unknown version, truncated or
            damaged.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and read its metadata and tensor records."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                file.seek(0)
                self._check_magic(file.read(8))
                self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SimdiffError(f"{path}: must be a readable GGUF file: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self.mapped.close()
            raise

    def _check_magic(self, head: bytes) -> None:
        if head[:4] != MAGIC or len(head) < 8:
            raise SimdiffError(
                f"{self.path}: must be a GGUF file, which starts with {MAGIC!r}, got {head[:4]!r}"
            )
        version = int.from_bytes(head[4:], "little")
        if version > 0xFFFF:
            raise SimdiffError(
                f"{self.path}: is a big-endian GGUF file; convert it first: "
                f"gguf-convert-endian {self.path.name} little"
            )
        if version not in (2, 3):
            raise SimdiffError(
                f"{self.path}: must be GGUF version 2 or 3, got {version}; convert the original "
                "checkpoint again with today's llama.cpp"
            )
        self.version = version

    def _read(self) -> None:
        num_tensors, num_entries = self._unpack("QQ", 8)
        # Each of them takes some bytes, so damaged counts must not cause a loop of hours.
        if 24 * num_tensors + 13 * num_entries > self.size:
            raise self._truncated(f"it says to hold {num_tensors} tensors, {num_entries} entries")
        position = 24
        self.entries: dict[str, Entry] = {}
        for _ in range(num_entries):
            entry = self._entry(position)
            if entry.key in self.entries:
                raise self._damaged(f"two entries are named {entry.key!r}")
            self.entries[entry.key] = entry
            position = entry.end
        self.alignment = self.whole("general.alignment", DEFAULT_ALIGNMENT)
        if self.alignment < 1 or self.alignment % 8:
            raise self._damaged(f"general.alignment is {self.alignment}, not a multiple of 8")
        records: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            record, position = self._tensor(position)
            records.append(record)
        data = align(position, self.alignment)
        self.tensors = [
            TensorRecord(name, shape, kind, data + offset, self._num_bytes(name, shape, kind))
            for name, shape, kind, offset in records
        ]
        self._check_tensors()

    def _check_tensors(self) -> None:
        names: set[str] = set()
        for tensor in self.tensors:
            if tensor.name in names:
                raise self._damaged(f"two tensors are named {tensor.name!r}")
            names.add(tensor.name)
            if tensor.offset % self.alignment:
                raise self._damaged(f"tensor {tensor.name} is not aligned to {self.alignment}")
            if tensor.offset + tensor.num_bytes > self.size:
                raise self._truncated(
                    f"tensor {tensor.name} ends at byte {tensor.offset + tensor.num_bytes}"
                )

    def _entry(self, start: int) -> Entry:
        key, position = self._string(start)
        (kind,) = self._unpack("I", position)
        value = position + 4
        if kind != ARRAY:
            return Entry(key, kind, kind, 1, start, value, self._skip(kind, value, key))
        element, count = self._unpack("IQ", value)
        value += 12
        return Entry(
            key, kind, element, count, start, value, self._skip_many(element, count, value, key)
        )

    def _skip(self, kind: int, position: int, key: str, depth: int = 0) -> int:
        """The end of the value that starts at `position`."""
        if kind in SCALARS:
            return position + struct.calcsize(SCALARS[kind])
        if kind == STRING:
            (length,) = self._unpack("Q", position)
            return position + 8 + int(length)
        if kind == ARRAY:
            element, count = self._unpack("IQ", position)
            if depth == MAX_DEPTH:
                raise self._damaged(f"the value of {key!r} is nested too deeply")
            return self._skip_many(element, count, position + 12, key, depth + 1)
        raise self._damaged(f"{key!r} has a value of unknown type {kind}")

    def _skip_many(self, kind: int, count: int, position: int, key: str, depth: int = 0) -> int:
        if kind in SCALARS:
            end = position + count * struct.calcsize(SCALARS[kind])
        else:
            end = position
            for _ in range(count):  # raises at the end of the file at the latest
                end = self._skip(kind, end, key, depth)
        if end > self.size:
            raise self._truncated(f"the value of {key!r} ends at byte {end}")
        return end

    def _tensor(self, start: int) -> tuple[tuple[str, tuple[int, ...], int, int], int]:
        name, position = self._string(start)
        (dimensions,) = self._unpack("I", position)
        if dimensions > 8:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._unpack(f"{dimensions}Q", position + 4)
        position += 4 + 8 * dimensions
        kind, offset = self._unpack("IQ", position)
        return (name, shape, kind, offset), position + 12

    def _num_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise SimdiffError(
                f"{self.path}: tensor {name} has type {kind}, which the installed gguf package "
                "does not know, so its size is unknown; upgrade gguf"
            ) from None
        elements = 1
        for length in shape:
            elements *= length
        if elements % block:
            raise self._damaged(f"tensor {name} has {elements} elements in blocks of {block}")
        return elements // block * size

    def _string(self, start: int) -> tuple[str, int]:
        (length,) = self._unpack("Q", start)
        end = start + 8 + int(length)
        if end > self.size:
            raise self._truncated(f"a name ends at byte {end}")
        try:
            return self.mapped[start + 8 : end].decode(), end
        except UnicodeDecodeError:
            raise self._damaged(f"the name at byte {start} is not UTF-8") from None

    def _unpack(self, layout: str, position: int) -> tuple[Any, ...]:
        try:
            return struct.unpack_from("<" + layout, self.mapped, position)
        except (struct.error, OverflowError):  # the latter of positions beyond 2^63
            raise self._truncated(f"its structure goes on at byte {position}") from None

    def _truncated(self, what: str) -> SimdiffError:
        return SimdiffError(
            f"{self.path}: is truncated: {what}, but the file has {self.size} bytes; "
            "copy or download it again"
        )

    def _damaged(self, what: str) -> SimdiffError:
        return SimdiffError(f"{self.path}: must be a sound GGUF file, but is damaged: {what}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a scalar or string entry."""
        entry = self.entries.get(key)
        if entry is None:
            return default
        if entry.kind == STRING:
            return self.mapped[entry.value + 8 : entry.end].decode(errors="replace")
        if entry.kind == ARRAY:
            raise self._damaged(f"{key!r} must be one value, but is an array of {entry.count}")
        return self._unpack(SCALARS[entry.kind], entry.value)[0]

    def whole(self, key: str, default: int) -> int:
        """The value of an entry that counts something."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._damaged(f"{key!r} must be a whole number, got {str(value)[:80]!r}")
        return value

    def is_array(self, key: str) -> bool:
        """Whether the file has an array under this key."""
        return key in self.entries and self.entries[key].kind == ARRAY

    def raw(self, entry: Entry) -> bytes:
        """The bytes of an entry, its key included."""
        return self.mapped[entry.start : entry.end]

    def with_value(self, entry: Entry, value: int) -> bytes:
        """The bytes of a scalar entry with another value of the same type."""
        return self.mapped[entry.start : entry.value] + struct.pack(
            "<" + SCALARS[entry.kind], value
        )

    def with_elements(self, entry: Entry, kept: Sequence[int]) -> bytes:
        """The bytes of an array entry that keeps only some elements, of any type."""
        ends = list(self._element_ends(entry))
        starts = [entry.value, *ends[:-1]]
        head = self.mapped[entry.start : entry.value - 8] + struct.pack("<Q", len(kept))
        return head + b"".join(self.mapped[starts[i] : ends[i]] for i in kept)

    def _element_ends(self, entry: Entry) -> Iterator[int]:
        position = entry.value
        for _ in range(entry.count):
            position = self._skip(entry.element, position, entry.key)
            yield position

    def close(self) -> None:
        """Unmap the file."""
        self.mapped.close()


def align(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def tensor_record(tensor: TensorRecord, name: str, offset: int) -> bytes:
    """The record of a tensor under another name; the offset is from the start of the data."""
    encoded = name.encode()
    return struct.pack(
        f"<Q{len(encoded)}sI{len(tensor.shape)}QIQ",
        len(encoded),
        encoded,
        len(tensor.shape),
        *tensor.shape,
        tensor.kind,
        offset,
    )


def text_entry(key: bytes, text: bytes) -> bytes:
    """A metadata entry of the type string."""
    string = 8
    return struct.pack("<Q", len(key)) + key + struct.pack("<IQ", string, len(text)) + text


def file_header(version: int, num_tensors: int, num_entries: int) -> bytes:
    """The first 24 bytes of a file."""
    return struct.pack("<4sIQQ", MAGIC, version, num_tensors, num_entries)
