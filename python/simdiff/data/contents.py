"""The documents in one opened file of each kind."""

from __future__ import annotations

import codecs
import io
import json
import unicodedata
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

from simdiff.data.conversations import Conversation, is_conversation
from simdiff.data.hub import column_in, no_column
from simdiff.data.tables import read_table
from simdiff.errors import SimdiffError

_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), *((mark, "utf-16") for mark in _UTF16))
# Unicode's controls, marks of format and separators: BOM, zero-width and no-break spaces too.
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")


def _decoded(file: BinaryIO, newline: str | None) -> TextIO:
    start = file.read(3)
    file.seek(0)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(file, encoding=encoding, newline=newline)


def _paragraphs(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    current: list[str] = []
    for line in _decoded(file, None):
        if any(unicodedata.category(character) not in _INVISIBLE for character in line):
            current.append(line.lstrip("\ufeff"))  # of a file that was appended to another one
        elif current:
            yield "".join(current)
            current = []
    yield "".join(current)


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """The values of JSON Lines, each with its place in words."""
    # Only "\n" ends a line: U+2028 and others may stand within a string.
    for number, line in enumerate(_decoded(file, "\n"), 1):
        line = line.lstrip("\ufeff")
        if not line.strip():
            continue
        where = f"text {name}: line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SimdiffError(f"{where} must be JSON, and is not: {error}") from None


def json_values(file: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON file: those of its array, or of its lines; each with its place."""
    content = file.read()
    try:
        values = json.loads(content.decode(json.detect_encoding(content)).lstrip("\ufeff"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        yield from json_lines(io.BytesIO(content), name)
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        yield f"text {name}: record {number}", value


def _documents_of_lines(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    for where, record in json_lines(file, name):
        yield _document(record, column, where)


def _documents_of_json(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    for where, record in json_values(file, name):
        yield record if isinstance(record, str) else _document(record, column, where)


def _document(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict):
        raise SimdiffError(f'{where} must be a JSON object with "{column}", got {_type(record)}')
    key = column_in(record, column)
    if key is None:
        raise no_column(f"{where} must be a JSON object with", column, record)
    return string_of(record[key], key, where)


def string_of(value: Any, column: str, where: str) -> str:
    """The document that a value is: a string, or a conversation."""
    if is_conversation(value):
        return Conversation.of(value)
    if not isinstance(value, str):
        raise SimdiffError(f'{where}: "{column}" must be a string, got {_type(value)}')
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "a value")


def _rows(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    names, values = read_table(file, name, column)
    key = column_in(names, column)
    if key is None:
        raise no_column(f"text {name}: must have the column", column, names)
    for number, value in enumerate(values, 1):
        yield string_of(value, column, f"text {name}: row {number}")


DOCUMENTS = {
    "plain": _paragraphs,
    "json lines": _documents_of_lines,
    "json": _documents_of_json,
    "table": _rows,
}
