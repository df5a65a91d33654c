"""Divide tensors into shards and copy them from file to file under new names, by streaming."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simdiff.checkpoints.weight_index import INDEX, SINGLE
from simdiff.errors import SimdiffError
from simdiff.io.progress import track_bytes
from simdiff.io.safetensors_header import (
    StoredTensor,
    file_order,
    header_bytes,
    total_bytes,
)

Named = tuple[str, StoredTensor]
"""The new name of a tensor, and the tensor."""

# Default of save_pretrained in transformers 5.
DEFAULT_SHARD_SIZE = "50GB"
_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
# Size of reads, which stay in the second-level cache. On a 2-core EPYC, from the page cache to
# ext4, reads of 0.5 to 1 MB copy 3.1 to 3.6 GB/s, reads of 4 MB 0.7, copy_file_range and sendfile
# between the unaligned offsets of tensors 2.3 to 2.5, and cp 2.2 to 3.8.
_BLOCK_BYTES = 1 << 20
_WRITEBACK_BYTES = 32 << 20
# Space for headers, index, config, and the needs of the file system.
_SLACK_BYTES = 4 << 20
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than allowed there",
}


@dataclass(frozen=True)
class Shard:
    """A file to write, with its tensors."""

    name: str
    tensors: tuple[Named, ...]
    """The tensors, in the order of their bytes in the file."""


def parse_size(size: int | str) -> int:
    """Convert a size such as 5GB to bytes, with decimal units as in save_pretrained.

    Raises:
        SimdiffError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match else 0
    if count < 1:
        raise SimdiffError(f"a size must be a number of bytes or such as 5GB, got {size!r}")
    return count


def split_shards(groups: Iterable[Sequence[Named]], max_bytes: int) -> list[Shard]:
    """Divide tensors into files as save_pretrained does: in order, a new file when one is full.

    Args:
        groups: tensors in saving order; the tensors of a group stay together.
        max_bytes: limit of the tensors' bytes in one file; a larger group gets its own file.
    """
    parts: list[list[Named]] = []
    current: list[Named] = []
    filled = 0
    for group in groups:
        size = total_bytes([tensor for _, tensor in group])
        if size > max_bytes:
            parts.append(list(group))
            continue
        if filled + size > max_bytes:
            parts.append(current)
            current, filled = [], 0
        current.extend(group)
        filled += size
    if current:
        parts.append(current)
    if len(parts) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    return [
        Shard(name, tuple(sorted(part, key=file_order)))
        for name, part in zip(names, parts, strict=True)
    ]


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuse an output for which the disk lacks space.

    Raises:
        SimdiffError: tells the bytes needed and free.
    """
    free = shutil.disk_usage(directory).free
    wanted = num_bytes + _SLACK_BYTES
    if free < wanted:
        shown = directory.parent if ".partial-" in directory.name else directory
        raise SimdiffError(
            f"the disk of {shown} must have {wanted:,} bytes free for the pruned checkpoint, "
            f"got {free:,}: free {math.ceil((wanted - free) / 1e7) / 100:.2f} GB or give an output "
            "elsewhere"
        )


def write_shards(shards: Sequence[Shard], directory: Path, metadata: dict[str, str]) -> None:
    """Stream all shards to a directory and sync them to the disk, with a progress bar.

    Raises:
        SimdiffError: the disk is full, or a source became shorter meanwhile.
    """
    total = sum(total_bytes([tensor for _, tensor in shard.tensors]) for shard in shards)
    with track_bytes(total, "copy the tensors that stay") as advance:
        for shard in shards:
            try:
                _write_shard(shard, directory / shard.name, metadata, advance)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise SimdiffError(
                    f"{directory.parent}: {_FULL[error.errno]}, while {shard.name} was written "
                    f"({total:,} bytes wanted for all weights): nothing was kept; make room or "
                    "give an output elsewhere"
                ) from None


def _write_shard(
    shard: Shard, path: Path, metadata: dict[str, str], advance: Callable[[int], None]
) -> None:
    head, data_bytes = header_bytes(shard.tensors, metadata)
    with path.open("xb", buffering=0) as file:
        output = _Output(file.fileno())
        output.write(memoryview(head))
        for source, start, num_bytes in _runs(shard.tensors):
            _copy(source, start, num_bytes, output, advance)
        os.fsync(file.fileno())
    size = path.stat().st_size
    if size != len(head) + data_bytes:
        raise SimdiffError(
            f"{path.name}: must have {len(head) + data_bytes:,} bytes once written, got {size:,}: "
            "the file system lost some"
        )


class _Output:
    """An output file whose bytes are written to the disk while further ones are copied."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._written = self._begun = 0

    def write(self, content: memoryview) -> None:
        while content:
            count = os.write(self._descriptor, content)
            content = content[count:]
            self._written += count
        if self._written - self._begun >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # On Linux this starts writing dirty pages without waiting, and frees written ones.
            span = self._written - self._begun
            os.posix_fadvise(self._descriptor, self._begun, span, os.POSIX_FADV_DONTNEED)
            self._begun = self._written


def _runs(tensors: Iterable[Named]) -> list[tuple[Path, int, int]]:
    """Join tensors that are adjacent in the source, so that each run is read at once."""
    runs: list[tuple[Path, int, int]] = []
    for _, tensor in tensors:
        if runs:
            path, start, num_bytes = runs[-1]
            if path == tensor.path and start + num_bytes == tensor.start:
                runs[-1] = (path, start, num_bytes + tensor.num_bytes)
                continue
        runs.append((tensor.path, tensor.start, tensor.num_bytes))
    return runs


def _copy(
    source: Path, start: int, num_bytes: int, output: _Output, advance: Callable[[int], None]
) -> None:
    block = memoryview(bytearray(min(_BLOCK_BYTES, num_bytes)))
    with source.open("rb", buffering=0) as file:
        file.seek(start)
        while num_bytes:
            count = file.readinto(block[: min(len(block), num_bytes)])
            if not count:
                raise SimdiffError(
                    f"{source}: became shorter while it was read ({num_bytes:,} bytes missing): "
                    "something else writes to it"
                )
            output.write(block[:count])
            num_bytes -= count
            advance(count)


def write_index(shards: Sequence[Shard], directory: Path, num_parameters: int) -> None:
    """Write the index of several shards, byte for byte as save_pretrained; none for one shard."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": num_parameters,
            "total_size": sum(total_bytes([t for _, t in shard.tensors]) for shard in shards),
        },
        "weight_map": {name: shard.name for shard in shards for name, _ in shard.tensors},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / INDEX).write_text(text, encoding="utf-8")
