"""The documents of a text source: files of every kind, folders of them, standard input, strings.

What a file holds is decided by its suffix, in any case, behind which may stand that of a
compression (`.gz`, `.bz2`):

- `.jsonl`, `.ndjson`: an object a line, whose "text" is a document;
- `.json`: an array of such objects or of strings, or what `.jsonl` holds;
- `.parquet`, `.arrow`, `.feather`: the column "text", a document a row; read by pyarrow;
- any other: plain text, whose documents stand between lines without visible characters.

A list of messages in place of a string is a conversation; so is one in the column "messages" of
what has no "text". A name that begins with `hf:` is that of a data set (`simdiff.data.hub`).

Text is UTF-8, or UTF-16 with a byte order mark.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import importlib
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from simdiff.data.contents import DOCUMENTS, json_lines, json_values, string_of
from simdiff.data.conversations import Conversation
from simdiff.data.demo import DEMO, demo_documents
from simdiff.data.hub import is_hub_text, read_hub_text
from simdiff.data.mixes import mixed
from simdiff.errors import SimdiffError, nearest_path

STANDARD_INPUT = "-"
COLUMN = "text"

_JSON_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet", ".arrow", ".feather")
# Taken from a folder, beside the two above. `.json` and `.md` in a folder mostly describe the data.
_PLAIN = (".txt", ".text", ".raw")
_LFS = b"version https://git-lfs"
# Modules of the standard library with a function `open`.
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2"}


@dataclass(frozen=True)
class TextFile:
    """A file or a folder whose documents stand in a column of another name than "text"."""

    path: str
    column: str = COLUMN


@dataclass(frozen=True)
class TextMix:
    """Several texts, read in proportion to their weights until one of them ends."""

    sources: tuple[Text, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse weights that are not one above 0 for each text."""
        if len(self.sources) != len(self.weights) or not all(w > 0 for w in self.weights):
            raise SimdiffError(
                f"weights of {len(self.sources)} texts must be as many numbers above 0, got "
                f"{', '.join(map(str, self.weights)) or 'none'}"
            )


Text: TypeAlias = str | Path | TextFile | TextMix | Sequence[str]
"""A source of documents, see `read_documents`."""


@dataclass(frozen=True)
class Run:
    """Consecutive documents of one kind of file."""

    documents: list[str]
    plain: bool
    """Paragraphs of plain text, which belong together; else each is a document of its own."""


def read_documents(source: Text) -> list[str]:
    """The documents of a text source, in their order.

    Args:
        source: "demo"; a data set by its name (`simdiff.data.hub`); a file, see the top of this
            module; a folder, of which all files of known suffixes are read, those in its folders
            too, sorted by name; "-" for standard input, or a pipe, which is JSON Lines where its
            first line is a JSON object, else plain text; a `TextFile`; a `TextMix`; or the
            documents themselves.

    Raises:
        SimdiffError: no such file, no text in it, or a file that is not what its suffix says.
    """
    return [document for run in read_runs(source) for document in run.documents]


def read_runs(source: Text) -> list[Run]:
    """The documents of a text source, plain text apart from others; see `read_documents`."""
    if isinstance(source, TextMix):
        parts = [read_documents(part) for part in source.sources]
        return [Run(mixed(parts, source.weights), plain=False)]
    if not isinstance(source, (str, Path, TextFile)):
        return [Run(_given(source), plain=False)]
    name, column = path_and_column(source)
    if name == DEMO:
        _no_columns(name, column, "the demo's passages")
        return [Run(demo_documents(), plain=False)]
    if is_hub_text(name):
        rows = read_hub_text(name, column)[1]
        documents = [string_of(value, column, where) for where, value in rows if value is not None]
        return _not_empty(name, [Run(_stripped(documents), plain=False)])
    runs: list[Run] = []
    for shown, kind, file in _files(name):
        with file, _readable(shown):
            plain = kind == "plain"
            if plain:
                _no_columns(shown, column, "plain text")
            found = DOCUMENTS[kind](file, shown, column)
            documents = _stripped(found)
        if runs and runs[-1].plain == plain:
            runs[-1].documents.extend(documents)
        else:
            runs.append(Run(documents, plain))
    return _not_empty(name, runs)


def _not_empty(name: str, runs: list[Run]) -> list[Run]:
    if not any(run.documents for run in runs):
        raise SimdiffError(f"text {name}: must hold text, got none but blank characters")
    return runs


def _stripped(documents: Iterable[str]) -> list[str]:
    return [
        document if isinstance(document, Conversation) else document.strip()
        for document in documents
        if document.strip()
    ]


def check_text(source: Text) -> None:
    """Refuse a text that cannot be read, before anything that takes longer is done.

    A file that has been read and is as it was then is not read again.

    Raises:
        SimdiffError: see `read_documents`.
    """
    key = None
    if isinstance(source, (str, Path, TextFile)):
        name, column = path_and_column(source)
        if (path := Path(name)).is_file():
            key = (path.absolute(), column, path.stat().st_mtime_ns, path.stat().st_size)
    if key not in _checked:
        read_runs(source)
        if key is not None:
            _checked.add(key)


_checked: set[tuple[Path, str, int, int]] = set()
"""Files that were read, with their columns, as they were then."""


def with_column(source: str, column: str | None) -> Text:
    """A path, or with another column than the usual one a `TextFile`."""
    return source if column in (None, COLUMN) else TextFile(source, str(column))


def text_of_words(
    texts: Sequence[str], columns: Sequence[str] = (), weights: Sequence[float] = ()
) -> Text:
    """The text that a command line names: one, or several as a `TextMix`.

    Args:
        texts: paths and names.
        columns: none, one for all texts, or one for each.
        weights: none, which makes all equal, or one for each text.

    Raises:
        SimdiffError: other numbers of columns or weights.
    """
    if len(columns) not in (0, 1, len(texts)):
        raise SimdiffError(f"--text-column must name 1 column or {len(texts)}, got {len(columns)}")
    each = list(columns) * len(texts) if len(columns) == 1 else columns or [COLUMN] * len(texts)
    parts = [with_column(text, column) for text, column in zip(texts, each, strict=True)]
    if len(parts) == 1 and len(weights) < 2:
        return parts[0]
    return TextMix(tuple(parts), tuple(weights or [1.0] * len(parts)))


def path_and_column(source: str | Path | TextFile) -> tuple[str, str]:
    """The path of a file or folder, and the column of its documents."""
    name, column = str(source), COLUMN
    if isinstance(source, TextFile):
        name, column = str(source.path), source.column
    if not name:  # as a path it would be the folder of the moment
        raise SimdiffError(
            "text: must be a file, a folder, - for standard input or 'demo', got an empty name"
        )
    return name, column


def source_name(source: Text) -> str:
    """The name of a text source in result files; what has no path is named by its hash."""
    if isinstance(source, TextMix):
        pairs = zip(source.weights, source.sources, strict=True)
        return " + ".join(f"{weight:g} x {source_name(part)}" for weight, part in pairs)
    if not isinstance(source, (str, Path, TextFile)):
        joined = "\0".join(_given(source)).encode("utf-8", "surrogatepass")
        return f"{IN_MEMORY}, sha256 {_digest(joined)}"
    name, column = path_and_column(source)
    if is_hub_text(name):
        return read_hub_text(name, column)[0].source
    return f"{FROM_INPUT}, sha256 {_digest(_read_once(name))}" if name == STANDARD_INPUT else name


IN_MEMORY = "documents in memory"
FROM_INPUT = "standard input"


def cannot_be_read_again(name: str) -> bool:
    """Whether a name of `source_name` is that of a text that another process cannot read."""
    return any(f"{what}, sha256 " in name for what in (IN_MEMORY, FROM_INPUT))


def json_records(path: Path) -> Iterator[tuple[str, Any]] | None:
    """The values in a file of JSON or JSON Lines, each with its place in words; None for others.

    Raises:
        SimdiffError: while they are read: no such file, or not JSON.
    """
    if _kind(path) not in ("json", "json lines"):
        return None
    return _records_of(path)


def _records_of(path: Path) -> Iterator[tuple[str, Any]]:
    for shown, kind, file in _files(str(path)):
        with file, _readable(shown):
            yield from (json_values if kind == "json" else json_lines)(file, shown)


def _given(documents: Sequence[str]) -> list[str]:
    if not isinstance(documents, Sequence):
        raise SimdiffError(
            "text: must be a file, a folder, 'demo' or a list of documents, got "
            f"{type(documents).__name__}"
        )
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise SimdiffError(
                f"text: documents must be strings, got {type(document).__name__} at {index}"
            )
    given = [document.strip() for document in documents if document.strip()]
    if not given:
        raise SimdiffError(f"text: must hold text, got {len(documents)} documents of none")
    return given


def _no_columns(name: str, column: str, what: str) -> None:
    if column != COLUMN:
        raise SimdiffError(
            f"text {name}: {what} has no columns, got the column {column!r}: JSON Lines, Parquet "
            "and Arrow files have"
        )


@cache
def _read_once(name: str) -> bytes:
    """All of standard input, or of a pipe: it can be read once, and is asked for several times."""
    if name != STANDARD_INPUT:
        return Path(name).read_bytes()
    if sys.stdin is None or sys.stdin.closed:
        raise SimdiffError("text -: standard input must be open, and is closed")
    return sys.stdin.buffer.read()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _files(name: str) -> Iterator[tuple[str, str, BinaryIO]]:
    """The files of a source: its name in messages, what it holds, and the file, opened."""
    if name.startswith(f"{FROM_INPUT}, "):
        if name != source_name(STANDARD_INPUT):
            raise SimdiffError(f"text {name}: cannot be read again: give the text as a file")
        name = STANDARD_INPUT
    path = Path(name)
    if name == STANDARD_INPUT or (path.exists() and not path.is_file() and not path.is_dir()):
        shown = FROM_INPUT if name == STANDARD_INPUT else name
        content = _read_once(name)
        yield shown, _kind_of_content(content), io.BytesIO(content)
        return
    if not path.is_dir():
        yield name, _kind(path), _opened(path)
        return
    known = (*_PLAIN, *_JSON_LINES, *_TABLES)
    paths = sorted(
        found
        for found in path.rglob("*")
        if found.is_file()
        and _suffix(found) in known
        and not any(part.startswith(".") for part in found.relative_to(path).parts)
    )
    if not paths:
        raise SimdiffError(
            f"text {name}: the folder must hold text files ({', '.join(known)}, or these with "
            f"{', '.join(_COMPRESSED)}), got none"
        )
    for found in paths:
        yield str(found), _kind(found), _opened(found)


def _suffix(path: Path) -> str:
    """The suffix that tells what a file holds, in lower case, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return inner.suffix.lower()


def _kind(path: Path) -> str:
    suffix = _suffix(path)
    if suffix in _TABLES:
        return "table"
    return "json lines" if suffix in _JSON_LINES else "json" if suffix == ".json" else "plain"


def _kind_of_content(content: bytes) -> str:
    """What standard input holds, by its first line that is not blank."""
    start = content.removeprefix(codecs.BOM_UTF8).lstrip()
    first = start[: start.find(b"\n") if b"\n" in start else None]
    if start.startswith(b"{"):
        with contextlib.suppress(ValueError):
            return "json lines" if isinstance(json.loads(first), dict) else "plain"
    return "plain"


def _opened(path: Path) -> BinaryIO:
    module = _COMPRESSED.get(path.suffix.lower())
    try:
        opener = open if module is None else importlib.import_module(module).open
        file: BinaryIO = opener(path, "rb")
    except OSError as error:
        raise SimdiffError(
            f"text {path}: must be a text file, a folder of them, - for standard input, or "
            f"'demo': {error.strerror}{nearest_path(path)}"
        ) from None
    with _readable(str(path)):
        start = file.read(len(_LFS))
        file.seek(0)
    if start == _LFS:
        raise SimdiffError(f"text {path}: is a Git LFS pointer, not the file: `git lfs pull` it")
    return file


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say in words of ours what reading a file raises."""
    try:
        yield
    except SimdiffError:
        raise
    except UnicodeDecodeError as error:
        raise SimdiffError(
            f"text {name}: must be UTF-8 text, or UTF-16 with a byte order mark, but holds the "
            f"byte 0x{error.object[error.start]:02x} where neither has one: if it is text, "
            "convert it (`iconv -f LATIN1 -t UTF-8`)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:  # of compressed files too
        raise SimdiffError(f"text {name}: cannot be read: {error}") from None
