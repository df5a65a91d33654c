"""KeptRuns: the readings of a search in a file, so that an interruption repeats none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import SECONDS_BETWEEN_WRITES
from simdiff.io import ranks
from simdiff.io.json_files import check_key, header, read_json, write_json
from simdiff.planning.batches import Ask, Plan, Runs

SCHEMA = "simdiff.divergences"


class KeptRuns:
    """Asks for what is not known yet, and keeps it.

    Args:
        ask: reads plans on windows.
        path: of the file; None keeps nothing beyond this object.
        key: everything that the readings depend on, see
            `simdiff.evaluation.journal.evaluation_key`.

    Raises:
        SimdiffError: the file was made with another key, or is damaged.
    """

    def __init__(self, ask: Ask, path: Path | None, key: Mapping[str, Any]) -> None:
        """Read the file."""
        self._ask, self._path, self._key = ask, path, dict(key)
        self._known: dict[tuple[Plan, int], Tensor | None] = {}
        self._written, self._unwritten = time.monotonic(), False
        if path is not None:
            self._known = ranks.first(lambda: self._load(path) if path.exists() else {})

    def __call__(self, plans: Sequence[Plan], windows: Sequence[int]) -> Runs:
        """The runs of all plans on all windows."""
        wanted = [(plan, window) for plan in plans for window in windows]
        missing = [item for item in wanted if item not in self._known]
        if missing:
            unknown = {plan: None for plan, _ in missing}
            self._known.update(self._ask([*unknown], [*dict.fromkeys(w for _, w in missing)]))
            self._unwritten = True
            if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
                self._write()
        return {item: self._known[item] for item in wanted}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write what was read at the end of the with block, even after an error."""
        try:
            yield
        finally:
            self._write()

    def _write(self) -> None:
        if self._path is None or not self._unwritten:
            return
        entries = [
            {
                "removed": list(plan),
                "window": window,
                "runs": runs.tolist() if runs is not None and bool(runs.isfinite().all()) else None,
            }
            for (plan, window), runs in self._known.items()
        ]
        write_json(self._path, {**header(SCHEMA), "key": self._key, "divergences": entries})
        self._written, self._unwritten = time.monotonic(), False

    def _load(self, path: Path) -> dict[tuple[Plan, int], Tensor | None]:
        content = read_json(path, SCHEMA)
        check_key(path, content.get("key"), self._key)
        known: dict[tuple[Plan, int], Tensor | None] = {}
        try:
            for entry in content["divergences"]:
                place = tuple(map(int, entry["removed"])), int(entry["window"])
                runs = entry["runs"]
                known[place] = None if runs is None else torch.tensor(runs, dtype=torch.float64)
                if runs is not None and known[place].shape[:-1] != (2,):  # type: ignore[union-attr]
                    raise ValueError("runs must be two lists of numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must hold finished evaluations, but is damaged: "
                f"{type(error).__name__}: {error}"
            ) from None
        return known
