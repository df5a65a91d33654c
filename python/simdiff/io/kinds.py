"""The kinds of output that simdiff writes, told by their content, whatever their names.

`--overwrite` replaces an earlier output of the same kind, and nothing else.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from enum import Enum
from pathlib import Path

from simdiff.errors import SimdiffError
from simdiff.io.json_text import json_text

PLAN_FILE = "plan.json"
COMPARISON_MARKER = "compare.json"
REPRODUCTION_MARKER = "reproduction.json"
RESULTS_FILE = "results.json"
# What a command that writes a directory puts into it, to be repeated with --config.
CONFIG = "config.yaml"
# The commands that do.
DIRECTORY_COMMANDS = ("run", "prune", "recover", "compare")

GENERATOR = "<meta name='generator' content='simdiff-kernels'>"
"""Stands in the head of every page."""
MERGEKIT_HEAD = "# mergekit: layers are counted from 0"
"""Begins every mergekit configuration that is written."""
FIGURE_MARK = "simdiff-kernels figure"
"""Stands in every figure of a file of its own, in the root of an SVG, as the creator of a PDF."""
TRACE_SCHEMA = "simdiff.trace"
"""The schema in the first entry of a trace of a calibration pass."""


class Kind(Enum):
    """What an output is, in the words of messages."""

    SCORES = "a file of scores"
    PLAN = "a plan.json"
    EVALUATION = "a file of an evaluation"
    BENCH = "a file of a benchmark"
    PAGE = "a page of a report"
    MERGEKIT = "a mergekit configuration"
    LAYERS = "a list of layers"
    TRACE = "a trace"
    FIGURE = "a figure"
    GGUF = "a GGUF file that simdiff cut"
    MODEL = "the directory of a pruned model"
    RUN = "the directory of a run"
    COMPARISON = "the directory of a comparison"
    REPRODUCTION = "the directory of a table of the paper"


GGUF_MARK = b"simdiff.removed_layers"
"""The name of a metadata entry of every GGUF file that is written."""

_OF_SCHEMA = {
    "simdiff.scores": Kind.SCORES,
    "simdiff.plan": Kind.PLAN,
    "simdiff.sublayer_plan": Kind.PLAN,
    "simdiff.evaluation": Kind.EVALUATION,
    "simdiff.bench": Kind.BENCH,
    "simdiff.results": Kind.RUN,
    "simdiff.comparison": Kind.COMPARISON,
    "simdiff.reproduction": Kind.REPRODUCTION,
    TRACE_SCHEMA: Kind.TRACE,
}
_SCHEMA = re.compile(rb'\s*\{\s*"schema":\s*"([\w.-]+)"')
_HEAD = 4096
FILES = "files"
"""The entry of a directory's record that lists what was written into it; all else is the user's."""
_RECORDS = {
    Kind.MODEL: PLAN_FILE,
    Kind.RUN: PLAN_FILE,
    Kind.COMPARISON: COMPARISON_MARKER,
}
_NAMED = 5
# The same of directories of earlier versions, which list nothing.
_ENTRIES = {
    Kind.RUN: {"model", PLAN_FILE, "scores.json", RESULTS_FILE, "report.html", CONFIG},
    Kind.COMPARISON: {
        COMPARISON_MARKER,
        "compare.csv",
        "compare.html",
        "scores.json",
        "plans",
        CONFIG,
    },
    Kind.REPRODUCTION: {REPRODUCTION_MARKER, "reproduction.md", "models", CONFIG},
}


def kind_of(path: Path) -> Kind | None:
    """What an existing file or directory is; None if simdiff did not write it."""
    if path.is_dir():
        return _kind_of_directory(path)
    try:
        head = _head(path)
    except (OSError, EOFError):
        return None
    if match := _SCHEMA.match(head):
        return _OF_SCHEMA.get(match[1].decode())
    if GENERATOR.encode() in head:
        return Kind.PAGE
    if head.startswith(MERGEKIT_HEAD.encode()):
        return Kind.MERGEKIT
    if head.startswith((b"<?xml", b"%PDF")) and FIGURE_MARK.encode() in path.read_bytes():
        return Kind.FIGURE
    if re.fullmatch(rb"\d+([,\n]\d+)*\n", head):
        return Kind.LAYERS
    return Kind.GGUF if head.startswith(b"GGUF") and _is_cut_gguf(path) else None


def _head(path: Path) -> bytes:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rb") as file:
        return bytes(file.read(_HEAD))


def _is_cut_gguf(path: Path) -> bool:
    """Whether the mark stands in the metadata, which a file begins with."""
    with path.open("rb") as file:
        return GGUF_MARK in file.read(2**20)


def _kind_of_directory(path: Path) -> Kind | None:
    kinds = {
        name: kind_of(path / name)
        for name in (PLAN_FILE, COMPARISON_MARKER, REPRODUCTION_MARKER, RESULTS_FILE)
        if (path / name).is_file()
    }
    if kinds.get(COMPARISON_MARKER) is Kind.COMPARISON:
        return Kind.COMPARISON
    if kinds.get(REPRODUCTION_MARKER) is Kind.REPRODUCTION:
        return Kind.REPRODUCTION
    if kinds.get(PLAN_FILE) is not Kind.PLAN:
        return None
    return Kind.RUN if kinds.get(RESULTS_FILE) is Kind.RUN else Kind.MODEL


def check_replaceable(path: Path, kind: Kind | None) -> None:
    """Refuse to replace what exists, unless it is empty or an earlier output of this kind.

    Raises:
        SimdiffError: says what it is instead, or what lies in it besides.
    """
    if not (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
        return
    found = kind_of(path)
    if kind is None or found is not kind:
        what = "is nothing that simdiff wrote" if found is None else f"is {found.value}"
        wanted = "" if kind is None else f", and overwrite=True replaces {kind.value} alone"
        raise SimdiffError(f"output {path} {what}{wanted}: it is not overwritten")
    if kind not in _RECORDS:
        return
    own = _listed(path / _RECORDS[kind])
    if own is not None:
        others = sorted(set(_files_in(path)) - own)
    else:
        known = _ENTRIES.get(kind)
        others = sorted(entry.name for entry in path.iterdir() if known and entry.name not in known)
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise SimdiffError(
            f"output {path} holds what simdiff did not write there ({', '.join(others[:_NAMED])}"
            f"{more}), and would be replaced as a whole: it is not overwritten; move that elsewhere"
        )
    if own is None:
        _tell_no_list(path)


def list_files(directory: Path, kind: Kind | None) -> None:
    """Write the names of all files of a finished directory into its record, where it has one."""
    record = directory / _RECORDS[kind] if kind in _RECORDS else None
    if record is not None and record.is_file():
        content = json.loads(record.read_bytes())
        content[FILES] = _files_in(directory)
        record.write_text(json_text(content), encoding="utf-8")


def _files_in(directory: Path) -> list[str]:
    """Everything in a directory that is no directory itself, by its path there."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _listed(record: Path) -> set[str] | None:
    """The files that a record lists; None where an earlier version wrote it."""
    try:
        found = json.loads(record.read_bytes())[FILES]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return set(map(str, found)) if isinstance(found, list) else None


@functools.cache
def _tell_no_list(path: Path) -> None:
    from simdiff.io.progress import tell

    tell(
        f"Note: {path} holds no list of its files, since an earlier simdiff wrote it: all that "
        "lies in it will be replaced"
    )
