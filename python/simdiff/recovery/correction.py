"""The states of a pruned model led back to those of the dense one, layer by layer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models import find_decoder_layers
from simdiff.recovery.depths import Depths, token_mask
from simdiff.recovery.normal_equations import Fit, NormalEquations, best_ridge
from simdiff.recovery.projections import OutputProjection, entering, find_projection, rms

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

FEATURES = ("auto", "inputs", "outputs")


@dataclass(frozen=True)
class Settings:
    """What the correction depends on besides model, plan and text."""

    strengths: tuple[float, ...] = STRENGTHS
    """Ridge penalties that are tried, see `normal_equations.ridge`."""
    norm_power: float = 2.0
    """p: tokens count by ‖h‖^−p, so that a massive activation does not outweigh all others."""
    features: str = "auto"
    """What the correction is linear in: "inputs" z of the projection, "outputs" o = Wz, which are
    fewer and can do less (W + VᵀW), or "auto": outputs where inputs exceed the memory budget."""
    memory_budget: int = 8 << 30
    """Bytes for the Gram matrices of the two parts of the text, and for one that is factorised."""
    unseen_share: float = 1 / 8
    """Of the windows, not fitted: λ, and how far down to correct, are chosen by them."""


@dataclass(frozen=True)
class LayerFit:
    """What the correction of one layer did."""

    layer: int
    """In the dense model, counted from 0."""
    projection: str | None
    features: str | None
    strength: float | None
    relative_error: float
    """Squared error of the states on unseen tokens, as a share of that without the correction."""


def precision(model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """Of forwards that only guide the correction."""
    if not autocasts(model):
        return contextlib.nullcontext()
    device = model.get_input_embeddings().weight.device
    return torch.autocast(device.type, dtype=torch.bfloat16)


def autocasts(model: PreTrainedModel) -> bool:
    """Whether products of the forwards are bfloat16: float32 models, where the CPU has them."""
    device = model.get_input_embeddings().weight.device
    if model.dtype != torch.float32:
        return False
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Change:
    """New parameters of a module, and those before."""

    position: int
    """Of the layer in the pruned model."""
    module: nn.Module
    old: dict[str, nn.Parameter | None]
    new: dict[str, nn.Parameter | None]


@dataclass
class Correction:
    """A pruned model on its way to the dense one's states; see `correct` for its fields."""

    model: PreTrainedModel
    pruned: PreTrainedModel
    kept: list[int]
    fitted: list[dict[str, Tensor]]
    unseen: list[dict[str, Tensor]]
    settings: Settings
    fits: list[LayerFit] = field(default_factory=list)
    most_features: int = 0
    """Of a regression so far."""
    corrections: list[Change] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    """Dense states, by batch: what enters the next layer that stays."""
    states: list[Tensor] = field(default_factory=list)
    """What enters the layer at hand in the pruned model as corrected so far."""

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """All text, that to fit first."""
        return [*self.fitted, *self.unseen]

    @property
    def first(self) -> int:
        """Position of the last layer before the first cut; 0 where layer 0 is cut."""
        gap = next((i for i, layer in enumerate(self.kept) if layer != i), len(self.kept))
        return max(0, gap - 1)

    def target_depth(self, position: int) -> int:
        """The dense layer whose entering states the layer at a position should give."""
        following = position + 1
        num_layers = len(find_decoder_layers(self.model))
        return self.kept[following] if following < len(self.kept) else num_layers

    def check(self) -> None:
        """Refuse text of padding alone."""
        for name, batches in (("fitted", self.fitted), ("unseen", self.unseen)):
            if not any(bool(token_mask(batch).any()) for batch in batches):
                raise SimdiffError(f"correct: {name} must leave some token, got none")

    def layer(self, position: int, dense: Depths, student: Depths) -> None:
        """Correct one layer and carry the states over it."""
        start = self.kept[position]
        if position == self.first:
            self.targets = [dense.run(b, None, 0, start) for b in self.batches]
            self.states = list(self.targets)
            if start != position:  # layer 0 is cut: the dense model is further already
                self.states = [student.run(b, None, 0, position) for b in self.batches]
        stop = self.target_depth(position)
        for index, batch in enumerate(self.batches):
            self.targets[index] = dense.run(batch, self.targets[index], start, stop)
        self.fits.append(self._fit(position, student))
        for index, batch in enumerate(self.batches):
            self.states[index] = student.run(batch, self.states[index], position, position + 1)

    def _fit(self, position: int, student: Depths) -> LayerFit:
        layer = student.layers[position]
        batch = {name: value[:1] for name, value in self.batches[0].items()}
        few = self.states[0][:1]
        projection = find_projection(
            layer,
            lambda: student.run(batch, few, position, position + 1),
            int(self.states[0].shape[-1]),
        )
        if projection is None or self._tied(projection):
            return LayerFit(self.kept[position], None, None, None, 1.0)
        features = self._features(projection)
        fitted, unseen = (self._equations(projection, features) for _ in range(2))
        with entering(projection) as seen:
            for index, batch in enumerate(self.batches):
                output = student.run(batch, self.states[index], position, position + 1)
                equations = fitted if index < len(self.fitted) else unseen
                rows = token_mask(batch)
                x, r, w = self._rows(
                    projection, seen[0], features, output, self.targets[index], rows
                )
                equations.update(x, r, w)
        fit = best_ridge(fitted, unseen, self.settings.strengths)
        if fit.correction is not None and features == "outputs":
            fit = replace(fit, correction=projection.from_outputs(fit.correction))
        self._apply(position, projection, fit)
        return LayerFit(
            self.kept[position], projection.name, features, fit.strength, fit.relative_error
        )

    def _tied(self, projection: OutputProjection) -> bool:
        """Whether other modules use the projection's weight too."""
        weight = projection.module.weight
        held = [p for m in self.pruned.modules() for p in m._parameters.values()]
        return sum(parameter is weight for parameter in held) > 1

    def _features(self, projection: OutputProjection) -> str:
        if self.settings.features != "auto":
            return self.settings.features
        num_bytes = 4 * 8 * (projection.in_features + projection.has_bias) ** 2
        return "inputs" if num_bytes <= self.settings.memory_budget else "outputs"

    def _equations(self, projection: OutputProjection, features: str) -> NormalEquations:
        hidden_size = int(self.states[0].shape[-1])
        width = projection.in_features if features == "inputs" else hidden_size
        self.most_features = max(self.most_features, width)
        return NormalEquations(width + projection.has_bias, hidden_size, self.states[0].device)

    def _rows(
        self,
        projection: OutputProjection,
        seen: tuple[Tensor, Tensor],
        kind: str,
        output: Tensor,
        target: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one batch: features, residuals that are to be linear in them, weights; float64."""
        device = self.states[0].device  # a model spread over GPUs has the others elsewhere

        def counted(states: Tensor) -> Tensor:
            return states.reshape(len(rows), -1)[rows.to(states.device)].to(device).double()

        entered, written, wanted, left = map(counted, (*seen, target, output))
        residuals = (wanted - left) / projection.scale
        features = entered if kind == "inputs" else written
        if projection.has_bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if projection.gain is not None:  # to first order: how rms(o) changes is left out
            features = features / rms(written)
            gain = projection.gain.to(residuals.device)
            residuals = residuals / gain.where(gain.abs() > 1e-3 * gain.abs().max(), torch.inf)
        norms = wanted.norm(dim=1)
        weights = torch.where(norms > 0, norms, torch.inf) ** -self.settings.norm_power
        return features, residuals, weights

    def _apply(self, position: int, projection: OutputProjection, fit: Fit) -> None:
        if fit.correction is None:
            return
        module = projection.module
        old = dict(module._parameters)
        projection.correct(fit.correction)
        new = dict(module._parameters)
        self.corrections.append(Change(position, module, old, new))

    def keep(self, count: int) -> None:
        """Apply the first corrections and take back the others."""
        for index, correction in enumerate(self.corrections):
            chosen = correction.new if index < count else correction.old
            correction.module._parameters.update(chosen)

    def closes_cut(self, position: int) -> bool:
        """Whether layers are missing behind the one at a position."""
        return self.target_depth(position) != self.kept[position] + 1
