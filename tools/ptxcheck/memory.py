"""Global buffers at fake 64-bit addresses, shared and local memory, and the log of accesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .floats import Array
from .values import UINT

# Generic addresses: these bits tell the spaces apart, global addresses have neither.
SHARED_WINDOW = 1 << 60
LOCAL_WINDOW = 1 << 61
_SPACING = 1 << 44  # between buffers
RED_ZONE = 64  # bytes between variables in shared and local memory


@dataclass
class Access:
    """One memory instruction by many threads: flat byte offsets in a region, and the moment."""

    line: int
    offsets: Array
    nbytes: int
    threads: Array  # linear over the whole grid
    cta_epochs: Array  # barriers that each thread has passed
    warp_epochs: Array  # warp synchronisations that each thread has passed
    write: bool
    atomic: bool = False


@dataclass(eq=False)
class Region:
    """Bytes with a state: which may be touched, which were written, who touched them."""

    name: str
    base: int  # address of the first byte, for the alignment of typed views
    data: Array
    valid: Array | None = None
    written: Array | None = None
    pending: Array | None = None  # bytes that an unfinished cp.async will write
    read_only: bool = False
    stride: int = 0  # bytes from one owner's segment to the next, in shared and local memory
    log: list[Access] = field(default_factory=list)
    _views: dict[tuple[int, int], Array] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.base + self.data.size

    def view(self, array: Array, nbytes: int) -> Array:
        """A per-byte array seen as words that start at multiples of `nbytes` in address space."""
        key = (id(array), nbytes)
        if key not in self._views:
            start = -self.base % nbytes
            count = max(array.size - start, 0) // nbytes
            words = array[start : start + count * nbytes].view(np.uint8).view(UINT[nbytes])
            self._views[key] = words
        return self._views[key]

    def index(self, offsets: Array, nbytes: int, count: int) -> Array:
        """Word indices, one row for each access of `count` words."""
        words = (offsets - (-self.base % nbytes)) // nbytes
        return words if count == 1 else words[:, None] + np.arange(count)

    def gather(self, array: Array, offsets: Array, nbytes: int, count: int) -> Array:
        """Words of a per-byte array at flat offsets: shape (n, count)."""
        return self.view(array, nbytes)[self.index(offsets, nbytes, count)].reshape(-1, count)

    def scatter(self, array: Array, offsets: Array, words: Array) -> None:
        """Write words of shape (n, count) to a per-byte array."""
        nbytes, count = words.dtype.itemsize, words.shape[1]
        where = self.index(offsets, nbytes, count)
        self.view(array, nbytes)[where] = words if count > 1 else words[:, 0]

    def all_set(self, flags: Array | None, offsets: Array, nbytes: int, count: int) -> Array | None:
        """Which accesses touch only bytes whose flag is set; None means all of them."""
        if flags is None:
            return None
        ones = UINT[nbytes](int.from_bytes(b"\1" * nbytes, "little"))
        good = (self.gather(flags, offsets, nbytes, count) == ones).all(axis=1)
        return None if good.all() else good

    def mark(
        self, flags: Array | None, offsets: Array, nbytes: int, count: int, value: int
    ) -> None:
        """Set the flags of all bytes touched."""
        if flags is not None:
            word = UINT[nbytes](int.from_bytes(bytes([value]) * nbytes, "little"))
            self.scatter(flags, offsets, np.full((offsets.size, count), word))


@dataclass(eq=False)
class Buffer:
    """Global memory of `nbytes` at `address`, backed by one NumPy array or by several pieces."""

    name: str
    address: int
    nbytes: int
    pieces: list[Region]
    conflicts: bool = True

    def __add__(self, nbytes: int) -> int:
        return self.address + nbytes


class GlobalMemory:
    """All buffers, found by address."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._pieces: list[Region] = []
        self._starts = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)

    def add(
        self,
        pieces: Mapping[int, Array],
        nbytes: int,
        name: str | None = None,
        *,
        align: int = 256,
        initialised: bool = True,
        read_only: bool = False,
        conflicts: bool = True,
    ) -> Buffer:
        """Register arrays at offsets of a new buffer whose base is aligned to `align` exactly."""
        if align < 1 or align & (align - 1) or align > 1 << 20:
            raise ValueError(f"align must be a power of two, got {align}")
        name = name or f"buffer{len(self.buffers)}"
        address = (len(self.buffers) + 1) * _SPACING + align
        regions = []
        for offset, array in sorted(pieces.items()):
            region = _region(name, address + offset, array, initialised)
            region.read_only = read_only
            regions.append(region)
        ends = [region.end for region in regions]
        if any(end > start.base for end, start in zip(ends, regions[1:], strict=False)):
            raise ValueError(f"the pieces of {name} overlap")
        if nbytes >= _SPACING // 2 or (ends and ends[-1] > address + nbytes):
            raise ValueError(f"{name} does not hold its pieces in {nbytes} bytes")
        buffer = Buffer(name, address, nbytes, regions, conflicts)
        self.buffers.append(buffer)
        self._pieces += regions
        self._starts = np.array([piece.base for piece in self._pieces], np.uint64)
        self._ends = np.array([piece.end for piece in self._pieces], np.uint64)
        return buffer

    def find(self, addresses: Array) -> Iterator[tuple[Region | None, Array | None]]:
        """Split addresses by the piece they fall into; None selects all of them."""
        if not self._pieces:
            yield None, None
            return
        ends = np.array([addresses.min(), addresses.max()])
        first, last = np.searchsorted(self._starts, ends, "right") - 1
        if first == last and first >= 0 and ends[1] < self._ends[first]:
            yield self._pieces[first], None
            return
        which = np.searchsorted(self._starts, addresses, "right") - 1
        which = np.where((which >= 0) & (addresses < self._ends[which]), which, -1)
        for i in np.unique(which):
            yield (self._pieces[i] if i >= 0 else None), np.flatnonzero(which == i)

    def describe(self, address: int) -> str:
        """The place of a bad address relative to the nearest buffer."""
        if not self.buffers:
            return "there are no buffers"

        def distance(buffer: Buffer) -> int:
            return max(buffer.address - address, address - buffer.address - buffer.nbytes, 0)

        nearest = min(self.buffers, key=distance)
        offset = address - nearest.address
        return f"byte {offset} of {nearest.name}, which has {nearest.nbytes}"


def _region(name: str, base: int, array: Array, initialised: bool) -> Region:
    """The memory of an array; the gaps between its rows may not be touched."""
    if any(stride < 0 for stride in array.strides):
        raise ValueError(f"{name}: negative strides")
    if array.size == 0:
        return Region(name, base, np.zeros(0, np.uint8))
    steps = zip(array.shape, array.strides, strict=True)
    span = sum((n - 1) * stride for n, stride in steps) + array.itemsize
    corner = array[tuple(slice(0, 1) for _ in array.shape)] if array.ndim else array.reshape(1)
    strided = np.lib.stride_tricks.as_strided
    data = strided(corner.reshape(-1).view(np.uint8), (span,), (1,), writeable=True)
    valid = None
    if not array.flags.c_contiguous:
        valid = np.zeros(span, bool)
        shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
        strided(valid, shape, strides)[...] = True
    written = None if initialised else np.zeros(span, bool)
    return Region(name, base, data, valid, written)


def segments(name: str, count: int, extents: Sequence[tuple[int, int]], nbytes: int) -> Region:
    """Uninitialised memory of `nbytes` for each of `count` owners, valid within the extents."""
    stride = -(-nbytes // 128) * 128
    valid = np.zeros((count, stride), bool)
    for start, end in extents:
        valid[:, start:end] = True
    total = count * stride
    region = Region(name, 0, np.zeros(total, np.uint8), valid.reshape(-1), np.zeros(total, bool))
    region.pending, region.stride = np.zeros(total, bool), stride
    return region
