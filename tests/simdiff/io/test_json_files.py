"""JSON files of strangers: refused before they take memory, time or the stack."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.io.json_files import MAX_DEPTH, MAX_JSON_BYTES, load_json, parse_json, read_json


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
        ("deep", "must be JSON, but is not: it is nested too deeply"),
        ("huge", "must be JSON of at most 100,000,000 bytes, got 10,000,000,000"),
        ("pipe", "must be JSON, and is not a regular file"),
        ("folder", "must be JSON, and is not a regular file"),
        ("bytes", "must be JSON, but is not"),
        ("digits", "must be JSON, but is not"),
        ("text", "must be JSON, but is not"),
        ("absent", "must be JSON, but cannot be read: No such file"),
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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("NaN", "numbers must be finite, got NaN"),
        ("-Infinity", "numbers must be finite, got -Infinity"),
        ("1e999", "numbers must be finite, got 1e999"),
        (str(1 << 64), "64 bits at most, got 18446744073709551616"),
        ("1" + "0" * 400, "64 bits at most, got 1000"),  # float() of it overflows
        (r'"\ud800"', "half of a surrogate pair"),  # which cannot be written again
        (r'{"\udc00": 1}', "half of a surrogate pair"),
        ("[" * 900 + "]" * 900, "nested too deeply"),  # json reads it, nothing can copy it
        ('{"a": ' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested too deeply"),
    ],
)
def test_values_that_would_fail_later(text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        parse_json(f"[{text}]" if text[0] not in "[{" else text)


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "1.5e300", str((1 << 64) - 1), r'"\ud83d\ude00 \\ud800"', "[" * 100 + "]" * 100],
)
def test_values_that_are_taken(text: str) -> None:
    assert json.dumps(parse_json(text)) == json.dumps(json.loads(text))
