"""What a correction depends on besides model, plan and text, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

FEATURES = ("auto", "inputs", "outputs")


@dataclass(frozen=True)
class Settings:
    """Everything the correction depends on besides model, plan and text."""

    strengths: tuple[float, ...] = STRENGTHS
    """Ridge penalties to try, see `normal_equations.ridge`."""
    norm_power: float = 1.5
    """Exponent p of the weights ‖h‖^−p of tokens, by which massive activations do not dominate."""
    features: str = "auto"
    """Features of the correction: "inputs" z of the projection; "outputs" o = Wz, which are fewer
    and can correct less (W + VᵀW); "auto" takes outputs if inputs exceed the memory budget."""
    memory_budget: int = 8 << 30
    """Limit of the bytes of a Gram matrix and its factorisations."""
    unseen_share: float = 1 / 8
    """Share of the windows that are not fitted; they choose λ and the number of corrections. It is
    less of much text, see `method.unseen_windows`."""
    after_cut: int = 2
    """Layers behind each cut that are corrected, beside the one before it."""


@dataclass(frozen=True)
class PartFit:
    """The result of correcting what lies within a layer, before its end."""

    modules: tuple[str, ...]
    """Names within the layer: those that read one tensor, or the one that writes to the stream."""
    strength: float | None
    relative_error: float
    """Squared error of what enters them, or of the stream behind them, on unseen tokens over the
    error without the correction."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> PartFit:
        """From what `dataclasses.asdict` made of one, also by way of JSON."""
        return cls(**{**content, "modules": tuple(content["modules"])})


@dataclass(frozen=True)
class LayerFit:
    """The result of correcting one layer."""

    layer: int
    """Index of the layer in the dense model, from 0."""
    projection: str | None
    features: str | None
    strength: float | None
    relative_error: float
    """Squared error of the states on unseen tokens over the error without the correction."""
    parts: tuple[PartFit, ...] = ()
    """What was corrected within the layer before, in order."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> LayerFit:
        """From what `dataclasses.asdict` made of one, also by way of JSON."""
        return cls(**{**content, "parts": tuple(PartFit.of(one) for one in content["parts"])})

    @property
    def strengths(self) -> dict[tuple[str, ...], float | None]:
        """The strengths that were chosen, by the modules that they were chosen for."""
        found = {part.modules: part.strength for part in self.parts}
        return found if self.projection is None else found | {(self.projection,): self.strength}
