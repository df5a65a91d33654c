"""The directory that `simdiff verify` checks, and what a check of it can find."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.record import RecoveryRecord


@dataclass(frozen=True)
class Check:
    """The result of one check; `passed` is None if it could not be run."""

    name: str
    passed: bool | None
    detail: str

    def line(self) -> str:
        """The result in words: a mark, the name of the check and its finding."""
        mark = {True: "ok  ", False: "FAIL", None: "skip"}[self.passed]
        return f"{mark}  {self.name}: {self.detail}"


@dataclass
class Subject:
    """The directory under check, with everything the checks have loaded from it so far."""

    directory: Path
    against: str | None
    config: dict[str, Any] = field(default_factory=dict)
    model: PreTrainedModel | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    plan: PruningPlan | None = None
    recovery: RecoveryRecord | None = None


class Skip(Exception):  # noqa: N818 - not an error: the check does not apply
    """A check that does not apply, and why."""


class UnusableError(SimdiffError):
    """The original model cannot be loaded, so the directory cannot be compared with it."""


class Fault(Exception):  # noqa: N818 - the finding of a failed check, in words
    """What a check found to be wrong."""
