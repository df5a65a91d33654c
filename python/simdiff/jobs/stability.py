"""Calibration that reads more text until the plan no longer depends on which text it was.

The rule: after `first` windows, and after each doubling up to `max_windows`, the plan is computed
from the scores of all windows so far, and again from each of B bootstrap resamples of them
(`simdiff.planning.bootstrap`). Where at least a share `confidence` of the resamples gives the same
plan, the pass ends: it is stable. The plan is the one that scores alone give, before any
evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from simdiff.data.batches import Batch
from simdiff.data.text import TokenWindows
from simdiff.errors import SimdiffError, number_of
from simdiff.io import ranks
from simdiff.io.progress import console
from simdiff.planning.bootstrap import PlanOf, bootstrap_plan
from simdiff.planning.names import NUM_RESAMPLES
from simdiff.scoring.calibration_pass import DEFAULT_GROUPS, CalibrationPass, score
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.scores import score_with_sublayers


@dataclass(frozen=True)
class ScoringOptions:
    """How a calibration pass is made."""

    skip_leading: int = 0
    groups: int = DEFAULT_GROUPS
    sublayers: bool = False
    """Also score the attention and the MLP of every layer."""
    until_stable: bool = False
    """Read more windows until the plan is stable, instead of a given number."""
    confidence: float = 0.95
    max_windows: int = 128
    max_state_bytes: int | None = None
    """Of the hidden states of one forward, which blocks need all at once; None: no limit."""

    def check(self, num_windows: int, window_length: int) -> None:
        """Refuse what cannot be, before a model is loaded.

        Raises:
            SimdiffError: see the message.
        """
        if not 0 <= self.skip_leading < window_length:
            raise SimdiffError(
                f"skip_leading must be 0 or more and below the window length {window_length}, got "
                f"{self.skip_leading}"
            )
        if self.max_state_bytes is not None and self.max_state_bytes < 1:
            raise SimdiffError(
                f"the memory for hidden states must be at least a byte, got {self.max_state_bytes}"
            )
        if self.groups < 1:
            raise SimdiffError(f"groups must be at least 1, got {self.groups}")
        if self.sublayers and (self.skip_leading or self.until_stable):
            raise SimdiffError(
                "sub-layers are scored over all tokens of all windows: not with skip_leading, and "
                "not until the plan is stable"
            )
        if not self.until_stable:
            return
        if not 0 < self.confidence <= 1:
            raise SimdiffError(
                f"the confidence of a stable plan must be above 0 and at most 1, got "
                f"{self.confidence}"
            )
        if self.max_windows < max(2, num_windows):
            raise SimdiffError(
                f"max_windows must be at least 2 and at least the {num_windows} windows of the "
                f"first check, got {self.max_windows}"
            )
        if self.groups < 2:
            raise SimdiffError("a stable plan needs at least 2 groups of sequences, got 1")

    def num_windows(self, num_windows: int) -> int:
        """How many windows of text have to be at hand."""
        return self.max_windows if self.until_stable else num_windows


def score_windows(
    model: PreTrainedModel,
    windows: TokenWindows,
    options: ScoringOptions,
    plan_of: PlanOf,
    *,
    first: int,
    name: str = "",
    batch_size: int = 8,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[LayerScores, TokenWindows]:
    """The calibration pass, on all windows or on as many as the plan needs to be stable.

    Args:
        model: the dense model.
        windows: of which the first ones are read, or all.
        options: see there.
        plan_of: from scores to the plan that has to be stable.
        first: windows of the first check.
        name: of the model, for the record.
        batch_size: windows per forward.
        num_resamples, seed: of the bootstrap.

    Returns:
        The scores, and the windows that they are of.

    Raises:
        SimdiffError: a plan that cannot be made, or what `score` raises.
    """
    if not options.until_stable:
        scores_of = _with_sublayers if options.sublayers else score
        scores = scores_of(
            model,
            windows.batches(batch_size),
            name=name,
            calibration=windows.identity.to_dict(),
            groups=options.groups,
            skip_leading=options.skip_leading,
            max_state_bytes=options.max_state_bytes,
        )
        return scores, windows
    whole = CalibrationPass(
        model,
        num_sequences=len(windows.tokens),
        name=name,
        groups=options.groups,
        skip_leading=options.skip_leading,
        max_state_bytes=options.max_state_bytes,
    )
    checks: list[dict[str, Any]] = []
    done = 0
    for target in _targets(first, len(windows.tokens)):
        batches = list(windows.tokens[done:target].split(batch_size))
        whole.feed(batches, f"score, windows {done + 1} to {target}")
        done, used = target, windows.first(target)
        scores = whole.scores(used.identity.to_dict())
        found = bootstrap_plan(scores, plan_of, num_resamples=num_resamples, seed=seed)
        agreement = None if found is None else found.agreement
        removed = sorted(plan_of(scores).removed)
        checks.append({"num_windows": done, "agreement": agreement, "removed": removed})
        stable = agreement is not None and agreement >= options.confidence
        _tell(done, agreement, options.confidence, stable, last=done == len(windows.tokens))
        if stable:
            break
    stability = {
        "stable": stable,
        "confidence": options.confidence,
        "num_resamples": num_resamples,
        "seed": seed,
        "max_windows": options.max_windows,
        "checks": checks,
        "note": _note(stable, checks, options, num_resamples),
    }
    return replace(scores, stability=stability), used


def _with_sublayers(
    model: PreTrainedModel, batches: Sequence[Batch], **options: Any
) -> LayerScores:
    """Scores of sub-layers too, whose running states one process makes for all windows."""
    return ranks.first(lambda: score_with_sublayers(model, batches, **options))


def _targets(first: int, most: int) -> Iterator[int]:
    target = min(first, most)
    while target < most:
        yield target
        target = min(2 * target, most)
    yield most


def _share(agreement: float | None) -> str:
    return "cannot be drawn again" if agreement is None else f"comes in {agreement:.0%} of draws"


def _tell(done: int, agreement: float | None, wanted: float, stable: bool, last: bool) -> None:
    what = "stable" if stable else "not stable, and no more windows" if last else "more windows"
    console.print(
        f"{number_of(done, 'window')}: the plan {_share(agreement)} ({wanted:.0%} wanted): {what}",
        highlight=False,
    )


def _note(
    stable: bool, checks: list[dict[str, Any]], options: ScoringOptions, num_resamples: int
) -> str:
    last = checks[-1]
    checked = ", ".join(str(check["num_windows"]) for check in checks)
    rule = (
        f"checked after {checked} windows, {options.confidence:.0%} of {num_resamples} bootstrap "
        "resamples wanted"
    )
    if stable:
        return (
            f"calibration stopped at {number_of(last['num_windows'], 'window')}: the plan from "
            f"scores alone is stable, {last['agreement']:.0%} of resamples give it ({rule})"
        )
    why = (
        "--max-windows was reached"
        if last["num_windows"] >= options.max_windows
        else "the text ended"
    )
    return (
        f"calibration stopped at {number_of(last['num_windows'], 'window')} WITHOUT a stable plan, "
        f"since {why}: the plan from scores alone {_share(last['agreement'])} ({rule})"
    )
