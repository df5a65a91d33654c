"""JSON files of strangers: refused before they take memory, time or the stack."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.io.json_files import MAX_JSON_BYTES, load_json, read_json


def spoil(path: Path, how: str) -> None:
    if how == "deep":
        path.write_text("[" * 200_000)
    elif how == "huge":
        with path.open("wb") as file:
            file.truncate(MAX_JSON_BYTES * 100)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "bytes":
        path.write_bytes(b"\xff\xfe{}")
    elif how == "digits":
        path.write_text("1" * 100_000)
    elif how == "text":
        path.write_text("{")


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("deep", "must be JSON, but is nested too deeply"),
        ("huge", "must be JSON of at most 100,000,000 bytes, got 10,000,000,000"),
        ("pipe", "must be JSON, and is not a regular file"),
        ("folder", "must be JSON, and is not a regular file"),
        ("bytes", "must be JSON, but is not"),
        ("digits", "must be JSON, but is not"),
        ("text", "must be JSON, but is not"),
        ("absent", "must be JSON, readable: No such file"),
    ],
)
def test_files_that_cannot_be_read(how: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    spoil(path, how)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SimdiffError, match=wanted) as caught:
        load_json(path)
    assert str(caught.value).startswith(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB
    with pytest.raises(SimdiffError, match=r"must be a readable simdiff.plan file"):
        read_json(path, "simdiff.plan")
