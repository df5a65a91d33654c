"""JournalFile: finished entries in a file, so that an interruption repeats none."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.json_files import check_key, header, read_json, write_json

# Least time between two writes. Each writes the whole file, and more often would cost more time
# than an interruption can lose.
SECONDS_BETWEEN_WRITES = 1.0

Name = TypeVar("Name", bound=Hashable)
Entry = TypeVar("Entry")


class JournalFile(Generic[Name, Entry]):
    """Entries by name, written at most once a second, and by `flush`.

    Args:
        schema: of the file, see `simdiff.io.json_files.SCHEMAS`.
        path: of the file; None keeps the entries in memory only.
        key: everything that the entries depend on.
        field: the name of their list in the file.
        to_json: makes an object of one entry.
        from_json: the reverse; raises KeyError, TypeError or ValueError for another object.

    Raises:
        SimdiffError: the file was made with another key, or is damaged.
    """

    def __init__(
        self,
        schema: str,
        path: Path | None,
        key: Mapping[str, Any],
        field: str,
        to_json: Callable[[Name, Entry], dict[str, Any]],
        from_json: Callable[[dict[str, Any]], tuple[Name, Entry]],
    ) -> None:
        """Read the file; of several processes the first does."""
        self._schema, self._path, self._key, self._field = schema, path, dict(key), field
        self._to_json, self._from_json = to_json, from_json
        self._written, self._unwritten = time.monotonic(), False
        self.entries: dict[Name, Entry] = {}
        """All that are known; to be changed by `keep`."""
        if path is not None:
            self.entries = ranks.first(lambda: self._load(path) if path.exists() else {})

    def keep(self, found: Mapping[Name, Entry]) -> None:
        """Take further entries, and write the file if that was long ago."""
        self.entries.update(found)
        self._unwritten = True
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write the file if there are new entries."""
        if self._path is None or not self._unwritten:
            return
        entries = [self._to_json(name, entry) for name, entry in self.entries.items()]
        write_json(self._path, {**header(self._schema), "key": self._key, self._field: entries})
        self._written, self._unwritten = time.monotonic(), False

    def _load(self, path: Path) -> dict[Name, Entry]:
        content = read_json(path, self._schema)
        check_key(path, content.get("key"), self._key)
        try:
            return dict(map(self._from_json, content[self._field]))
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must hold finished evaluations, but is damaged: "
                f"{type(error).__name__}: {error}"
            ) from None
