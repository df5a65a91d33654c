"""Headers: what safetensors' own library writes and reads, and what it would refuse."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, save_file

from simdiff.errors import SimdiffError
from simdiff.io.safetensors_header import (
    MAX_HEADER_BYTES,
    file_order,
    header_bytes,
    read_header,
)
from support.checkpoints import write_raw

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_every_dtype_as_the_library_has_it(tmp_path: Path) -> None:
    """Offsets, shapes and order of a file of all dtypes; our header is its header."""
    tensors = {
        f'{name}.é"\\\n{index}': torch.ones(index + 1, 3).to(dtype)
        for index, (name, dtype) in enumerate(_TYPES.items())
    }
    tensors |= {"empty": torch.ones(0, 4), "scalar": torch.tensor(1.5)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    metadata, entries = read_header(path)
    assert metadata == {"format": "pt"}
    assert {entry.name: entry.shape for entry in entries} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    raw = path.read_bytes()
    for entry in entries:
        wanted = tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert raw[entry.start : entry.start + entry.num_bytes] == wanted
    shuffled = sorted([(entry.name, entry) for entry in entries[::-1]], key=file_order)
    head, data_bytes = header_bytes(shuffled, metadata)
    assert raw.startswith(head)
    assert len(raw) == len(head) + data_bytes


BROKEN = [
    (b"", "at least 8 bytes, got 0"),
    (b"\x80\x02}", "at least 8 bytes, got 3"),
    (struct.pack("<Q", 1 << 62) + b"{}", "first 8 bytes say 4,611,686,018,427,387,904"),
    (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100,000,000"),
    (struct.pack("<Q", 100) + b"{}", "header must have 100 bytes, but the file ends after 2"),
    (struct.pack("<Q", 2) + b"{]", "must be JSON"),
    (struct.pack("<Q", 2) + b"\xff\xfe", "must be JSON"),
    (struct.pack("<Q", 8) + b'"\\ud800"', "half of a surrogate pair"),
    (struct.pack("<Q", 2) + b"[]", "must be a JSON object, got list"),
    (struct.pack("<Q", 200_000) + b"[" * 200_000, "must be JSON, but is not: it is nested"),
]


@pytest.mark.parametrize(("content", "wanted"), BROKEN)
def test_damaged_files(content: bytes, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SimdiffError, match=wanted) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_name_that_comes_twice_is_found_at_once(tmp_path: Path) -> None:
    names = ",".join(f'"{i}":0' for i in [*range(100_000), 99_999])
    write_raw(tmp_path / "x.safetensors", f"{{{names}}}".encode(), b"")
    start = time.monotonic()
    with pytest.raises(SimdiffError, match="names '99999' twice"):
        read_header(tmp_path / "x.safetensors")
    assert time.monotonic() - start < 10


BAD_ENTRIES = [
    ({"a": F32 | {"data_offsets": [0, 9]}}, 9, "must take 8 bytes .*span 9"),
    ({"a": F32 | {"shape": [-2]}}, 8, "whole numbers"),
    ({"a": F32 | {"shape": [2.0]}}, 8, "whole numbers"),
    ({"a": F32 | {"shape": "", "data_offsets": [0, 4]}}, 4, "whole numbers"),
    ({"a": F32 | {"data_offsets": {"0": 0, "8": 8}}}, 8, "whole numbers"),
    ({"a": F32 | {"dtype": []}}, 8, "unhashable"),
    ({"a": F32 | {"data_offsets": [8, 0]}}, 8, "span -8"),
    ({"a": {"dtype": "F32"}}, 8, "must have dtype, shape and data_offsets"),
    ({"a": 3}, 8, "must have dtype, shape and data_offsets"),
    ({"a": F32 | {"dtype": "F31"}}, 8, "one of the dtypes .*got 'F31'"),
    ({"a": F32, "b": F32}, 8, "'b' overlaps the tensor before it"),
    ({"a": F32 | {"data_offsets": [4, 12]}}, 12, "'a' follows a hole"),
    ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, 20, "'b' follows a hole.*byte 8.*got 12"),
    ({"a": F32}, 7, "truncated: its header says"),
    ({"a": F32}, 9, "too long: its header says"),
    ({"a": F32, "__metadata__": {"format": 3}}, 8, "__metadata__"),
    (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        0,
        "names 'a' twice",
    ),
]


@pytest.mark.parametrize(("header", "data_bytes", "wanted"), BAD_ENTRIES)
def test_headers_that_lie(header: object, data_bytes: int, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(data_bytes))
    with pytest.raises(SimdiffError, match=wanted) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if isinstance(header, dict):  # the library does not notice a name that comes twice
        with pytest.raises(SafetensorError), safe_open(path, "pt") as file:
            file.keys()
