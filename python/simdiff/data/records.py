"""What result files tell of where a text came from, and the text read again from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simdiff.data.documents import (
    COLUMN,
    Text,
    TextFile,
    TextMix,
    path_and_column,
    source_name,
)
from simdiff.data.hub import is_hub_text, read_hub_text


def source_record(source: Text) -> dict[str, Any]:
    """Tell of a text by plain JSON values: "source", and only where they say more "column", and
    "sources" of several texts or of a data set by name."""
    record: dict[str, Any] = {"source": source_name(source)}
    if isinstance(source, TextMix):
        record["sources"] = [
            {"weight": weight, **source_record(part)}
            for part, weight in zip(source.sources, source.weights, strict=True)
        ]
    elif isinstance(source, (str, Path, TextFile)):
        path, column = path_and_column(source)
        if column != COLUMN:
            record["column"] = column
        if is_hub_text(path):
            record["sources"] = [read_hub_text(path, column)[0].to_dict()]
    return record


def options_of_record(record: Mapping[str, Any]) -> list[str]:
    """The options of a command that read the same text: `--text` and what goes with it."""
    parts = record.get("sources") or []
    weights = [f"{part['weight']:g}" for part in parts if "weight" in part]
    if not weights:
        parts = [record]
    words = [word for part in parts for word in ("--text", str(part.get("source") or "TEXT"))]
    columns = [str(part.get("column", COLUMN)) for part in parts]
    if any(column != COLUMN for column in columns):
        words += ["--text-column", ",".join(columns)]
    return words + (["--text-weights", ",".join(weights)] if weights else [])


def source_of_record(record: Mapping[str, Any]) -> Text:
    """Make the text again that `source_record` told of."""
    parts = record.get("sources") or []
    if parts and "weight" in parts[0]:
        weights = tuple(float(part["weight"]) for part in parts)
        return TextMix(tuple(source_of_record(part) for part in parts), weights)
    name, column = str(record["source"]), record.get("column")
    return name if column in (None, COLUMN) else TextFile(name, str(column))
