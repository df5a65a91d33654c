"""Errors that a user can act on, and words of messages.

The command prints an error without a traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class SimdiffError(ValueError):
    """Raised for input that cannot be used; the message says what was expected and what came."""


class SurgeryError(SimdiffError):
    """The cut would leave a model that stock transformers cannot express."""


class Note(UserWarning):
    """What a user should know of a result that is right in itself; commands print it."""


def number_of(count: int, noun: str) -> str:
    """A number of things in words: `1 window`, `2 windows`, `1,024 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith(('ch', 's')) else 's'}"


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """For a message about an unknown name: the known one that it may be meant for, if any is."""
    import difflib

    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    if not found and len(name) > _SHORT:  # a part of it, such as mssd for simdiff-mssd
        found = [other for other in names if name.lower() in other.lower()][:1]
    return f"; did you mean {prefix}{found[0]}?" if found else ""


_SHORT = 2


def nearest_path(path: Path) -> str:
    """For a message about a path that is not there: the name beside it that may be meant."""
    folder = path.parent
    if not folder.is_dir():
        return ""
    # Files of one kind resemble each other by their suffix alone.
    known = [other.name for other in folder.iterdir() if _like(other.stem, path.stem)]
    prefix = "" if folder == Path() else f"{folder}/"
    return "" if path.name in known else nearest(path.name, known, prefix)


def _like(one: str, other: str) -> bool:
    import difflib

    return difflib.SequenceMatcher(None, one, other).ratio() > 0.6
