"""PlanConfidence: how sure a plan is, as the record that goes with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AmountOfText:
    """What plans from fewer sequences are worth."""

    num_groups: int
    agreement: float
    """Share of draws of so many groups that give the same plan as all sequences."""
    overlap: float
    """Share of that plan's layers that a draw removes too, the mean over draws."""


@dataclass(frozen=True)
class PlanConfidence:
    """What a bootstrap over calibration sequences tells of a plan, see `simdiff.bootstrap`."""

    removed: tuple[int, ...]
    """The plan that it is about, in order of depth: the one that scores alone give, before any
    evaluation."""
    plan_frequency: tuple[float, ...]
    """Of every layer: the share of resamples whose plan removes it."""
    agreement: float
    """The share of resamples that give the same plan."""
    importance_low: tuple[float, ...]
    """Of every layer: 2.5% of resamples give a lower importance, by percentiles."""
    importance_high: tuple[float, ...]
    """Of every layer: 2.5% give a higher one."""
    num_resamples: int
    num_failed: int
    """Resamples without any plan; they count as other plans."""
    num_groups: int
    """Groups of sequences, which are drawn."""
    num_sequences: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        lists = {key: list(value) for key, value in vars(self).items() if isinstance(value, tuple)}
        return {**vars(self), **lists}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], num_layers: int) -> PlanConfidence:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: something is missing or has another length.
        """

        def by_layer(key: str) -> tuple[float, ...]:
            if len(content[key]) != num_layers:
                raise ValueError(f"{key} must have {num_layers} entries")
            return tuple(map(float, content[key]))

        return cls(
            removed=tuple(map(int, content["removed"])),
            plan_frequency=by_layer("plan_frequency"),
            agreement=float(content["agreement"]),
            importance_low=by_layer("importance_low"),
            importance_high=by_layer("importance_high"),
            num_resamples=int(content["num_resamples"]),
            num_failed=int(content["num_failed"]),
            num_groups=int(content["num_groups"]),
            num_sequences=int(content["num_sequences"]),
            seed=int(content["seed"]),
        )

    def note(self, delivered: Collection[int]) -> str:
        """What the reader of a plan has to know, in a sentence.

        Args:
            delivered: the layers of the plan, another one perhaps than scores alone give.
        """
        unsure = [layer for layer, share in enumerate(self.plan_frequency) if 0.05 < share < 0.95]
        what = "sequences" if self.num_groups == self.num_sequences else "groups of sequences"
        plan = ", ".join(map(str, self.removed))
        layers = ", ".join(f"{layer} ({self.plan_frequency[layer]:.0%})" for layer in unsure)
        return (
            f"confidence of scores alone: over {self.num_resamples} bootstrap resamples of "
            f"{self.num_groups} {what}, {self.agreement:.0%} give their plan, {plan}"
            + ("; " if {*delivered} == {*self.removed} else ", which is NOT this one; ")
            + (f"{self.num_failed} give no plan at all; " if self.num_failed else "")
            + (
                f"in the plan sometimes: {layers}"
                if unsure
                else "no layer is in between 5% and 95% of the plans"
            )
        )
