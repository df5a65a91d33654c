"""PlanConfidence: the record in a plan that tells how sure it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AmountOfText:
    """How well plans made from fewer sequences agree with the plan of all."""

    num_groups: int
    agreement: float
    """Share of draws of this many groups that give the same plan as all sequences."""
    overlap: float
    """Mean over draws of the share of the plan's layers that the draw's plan removes too."""


@dataclass(frozen=True)
class PlanConfidence:
    """The confidence of a plan by a bootstrap over sequences, see `simdiff.planning.bootstrap`."""

    removed: tuple[int, ...]
    """Layers of the plan that was tested, in order of depth: the plan that scores alone give,
    before any evaluation."""
    plan_frequency: tuple[float, ...]
    """For every layer, the share of resamples whose plan removes it."""
    agreement: float
    """The share of resamples that give the same plan."""
    importance_low: tuple[float, ...]
    """For every layer, the 2.5th percentile of its importance over resamples."""
    importance_high: tuple[float, ...]
    """For every layer, the 97.5th percentile of its importance over resamples."""
    num_resamples: int
    num_failed: int
    """Number of resamples that gave no plan; they count as another plan."""
    num_groups: int
    """Number of groups of sequences from which the bootstrap draws."""
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
            KeyError, TypeError, ValueError: an entry is missing or has a wrong length.
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
        """Tell the confidence to the reader of a plan, in a sentence.

        Args:
            delivered: layers of the plan as delivered, which may differ from `removed`.
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
