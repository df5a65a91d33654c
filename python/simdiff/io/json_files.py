"""The JSON files that the toolkit exchanges: written whole, read with their schema checked."""

from __future__ import annotations

import datetime
import functools
import json
import math
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_text import json_text
from simdiff.io.outputs import write_bytes
from simdiff_kernels import __version__

SCHEMAS = {
    "simdiff.bench": 1,
    "simdiff.comparison": 1,
    "simdiff.comparison-cells": 1,
    "simdiff.comparison-scoring": 1,
    "simdiff.divergences": 1,
    # Version 3 has averages of classification and of generation apart.
    "simdiff.evaluation": 3,
    "simdiff.evaluations": 1,
    # Version 2 added selection and candidates; 3 added choice_agreement and dropped the decisive
    # layers.
    "simdiff.plan": 3,
    "simdiff.recovery": 1,
    "simdiff.reproduction": 1,
    "simdiff.results": 1,
    # Version 2 added the blocks; 3 their angular distance, and the sequences and leading tokens
    # apart; 4 may lack the absolute difference of blocks. Earlier files load without them.
    "simdiff.scores": 4,
    "simdiff.states": 1,
    "simdiff.sublayer_plan": 1,
}
"""Every kind of JSON file, and the newest version of each that this code writes and reads."""


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is either complete or absent."""
    write_bytes(Path(path), json_text(content).encode())


MAX_JSON_BYTES = 100_000_000
"""The largest JSON file that is read; the largest index known to us has 15 MB."""

MAX_DEPTH = 100
"""How deeply lists and objects may be nested; in no file of ours more than 10."""


def load_json(path: str | Path, wanted: str = "JSON") -> Any:
    """Read a JSON file of anybody's; its size is checked before any memory is taken.

    Args:
        path: the file.
        wanted: what it must be, for messages.

    Raises:
        SimdiffError: no regular file, too large, not JSON, or nested too deeply.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # such as a pipe, which never ends
        raise SimdiffError(f"{path}: must be {wanted}, and is not a regular file")
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise SimdiffError(
                f"{path}: must be {wanted} of at most {MAX_JSON_BYTES:,} bytes, got {size:,}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise SimdiffError(
            f"{path}: must be {wanted}, but cannot be read: {error.strerror}"
        ) from None
    try:
        return parse_json(content.decode())
    except ValueError as error:
        what = "is not" if wanted == "JSON" else "is not JSON"
        raise SimdiffError(f"{path}: must be {wanted}, but {what}: {error}") from None


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text that holds nothing which fails later, far from here.

    Numbers are finite and of 64 bits, strings can be written, and copies of it do not exhaust the
    stack: no file has anything else.

    Args:
        text: JSON.
        pairs: makes the value of an object of its names and values; a dict by default.

    Raises:
        ValueError: it is not JSON, or holds something else.
    """
    try:
        value = json.loads(
            text,
            parse_float=_finite,
            parse_int=_whole,
            parse_constant=_finite,
            object_pairs_hook=pairs,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        insides = (one.values() if isinstance(one, dict) else one for one in level if one)
        level = [one for inside in insides for one in inside if isinstance(one, (dict, list))]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"numbers must be finite, got {text[:40]}")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"whole numbers must have 64 bits at most, got {text[:40]}")
    return value


def as_object(value: Any) -> dict[str, Any]:
    """A value that must be a JSON object.

    Raises:
        TypeError: it is something else, of which dict() might make one.
    """
    if not isinstance(value, dict):
        raise TypeError(f"must be an object, got {str(value)[:80]}")
    return value


def read_json(path: str | Path, schema: str) -> dict[str, Any]:
    """Read a file written with `header(schema)`, of this version or an earlier one.

    Raises:
        SimdiffError: no such file, not JSON, another kind of file, or a newer version.
    """
    content = load_json(path, f"a readable {schema} file")
    if not isinstance(content, dict) or content.get("schema") != schema:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise SimdiffError(f"{path}: must be a {schema} file, got schema {found!r}")
    schema_version = SCHEMAS[schema]
    found = content.get("schema_version")
    if not isinstance(found, int) or not 1 <= found <= schema_version:
        raise SimdiffError(
            f"{path}: must have schema_version 1 to {schema_version}, got {found!r}"
            + ("; a newer simdiff wrote it" if isinstance(found, int) and found > 0 else "")
        )
    return content


def header(schema: str) -> dict[str, Any]:
    """The first entries of every JSON file: its schema, its version, and what wrote it."""
    return {
        "schema": schema,
        "schema_version": SCHEMAS[schema],
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
    }


@functools.cache  # to look them up takes milliseconds, and some files are written often
def _versions() -> dict[str, str]:
    return {
        "simdiff-kernels": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def check_key(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Refuse a file that was made for other input.

    Raises:
        SimdiffError: names the differences.
    """
    wanted = json.loads(json.dumps(wanted))  # with lists for tuples, as in the file
    if found == wanted:
        return
    found = found if isinstance(found, dict) else {}
    raise SimdiffError(
        f"{path} is of another run, which differs in {', '.join(_differing(found, wanted))}; "
        "remove it, give another output, or begin anew (restart=True, where there is that)"
    )


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of what differs, those within a mapping as `options.length`."""
    names = []
    for key in dict.fromkeys((*wanted, *found)):
        one, other = found.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += _differing(one, other, f"{prefix}{key}.")
        elif one != other:
            names.append(f"{prefix}{key}")
    return names
