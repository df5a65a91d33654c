"""KeptRuns: the readings of a search in a file, so that an interruption repeats none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simdiff.io.journal_file import JournalFile
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
        self._ask = ask
        self._file = JournalFile(SCHEMA, path, key, "divergences", _to_json, _from_json)

    def __call__(self, plans: Sequence[Plan], windows: Sequence[int]) -> Runs:
        """The runs of all plans on all windows."""
        known = self._file.entries
        wanted = [(plan, window) for plan in plans for window in windows]
        missing = [item for item in wanted if item not in known]
        if missing:
            unknown = {plan: None for plan, _ in missing}
            self._file.keep(self._ask([*unknown], [*dict.fromkeys(w for _, w in missing)]))
        return {item: known[item] for item in wanted}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write what was read at the end of the with block, even after an error."""
        try:
            yield
        finally:
            self._file.flush()


def _to_json(place: tuple[Plan, int], runs: Tensor | None) -> dict[str, Any]:
    finite = runs is not None and bool(runs.isfinite().all())
    return {
        "removed": list(place[0]),
        "window": place[1],
        "runs": runs.tolist() if runs is not None and finite else None,
    }


def _from_json(entry: dict[str, Any]) -> tuple[tuple[Plan, int], Tensor | None]:
    place = tuple(map(int, entry["removed"])), int(entry["window"])
    if entry["runs"] is None:
        return place, None
    runs = torch.tensor(entry["runs"], dtype=torch.float64)
    if runs.shape[:-1] != (2,):
        raise ValueError("runs must be two lists of numbers")
    return place, runs
