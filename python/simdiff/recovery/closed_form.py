"""Recovery without training: output projections of the layers that stay, solved layer by layer.

From the first cut on, each layer's last linear map W (behind its MLP, for most) is corrected so
that the pruned model's states come back to the dense model's at that depth. With z what enters the
map, y what leaves the layer, h the dense state that enters the next layer that stays, tokens t:

    V = argmin Σ w_t ‖h_t − y_t − Vᵀ z_t‖² + λ ‖V‖²,   w_t = ‖h_t‖^−p,   W ← W + Vᵀ

Layers are corrected in order, each on the states of the model as corrected so far: what one leaves
undone the next ones still see. λ is the one of lowest error on windows that were not fitted, and no
correction is a candidate; of the models corrected down to some depth, the one of lowest loss on
those windows is taken, and the plain cut is a candidate.

Related: ReplaceMe (arXiv 2505.02819) folds one linear map of the hidden state into the projection
before the cut; here every projection from there on is solved for in its own inputs, which are more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation import window_loss
from simdiff.models import find_decoder_layers
from simdiff.progress import track
from simdiff.recovery.depths import Depths, depths, model_inputs, token_mask
from simdiff.recovery.methods import RecoveryContext, RecoveryOutcome
from simdiff.recovery.normal_equations import Fit, NormalEquations, best_ridge
from simdiff.recovery.projections import OutputProjection, entering, find_projection, rms
from simdiff.selection import PruningPlan

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """What the correction depends on besides model, plan and text."""

    strengths: tuple[float, ...] = STRENGTHS
    """Ridge penalties that are tried, see `normal_equations.ridge`."""
    norm_power: float = 2.0
    """p: tokens count by ‖h‖^−p, so that a massive activation does not outweigh all others."""
    unseen_share: float = 1 / 8
    """Of the windows, not fitted: λ, and how far down to correct, are chosen by them."""


def recover(
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Tensor,
    *,
    pruned: PreTrainedModel,
    options: Mapping[str, Any],
    batch_size: int,
    context: RecoveryContext | None = None,
) -> RecoveryOutcome:
    """Correct the pruned model in closed form; see `simdiff.recovery.methods.Recover`."""
    settings = Settings(**options)
    count = unseen_windows(len(windows), settings.unseen_share)
    return correct(
        model,
        pruned,
        plan.kept,
        windows[:-count].split(batch_size),
        windows[-count:].split(batch_size),
        settings=settings,
    )


def unseen_windows(num_windows: int, share: float) -> int:
    """How many windows are kept from the fit.

    Raises:
        SimdiffError: fewer than two windows.
    """
    if num_windows < 2:
        raise SimdiffError(
            "closed-form recovery needs at least 2 windows of text, one to fit and one to choose "
            f"by, got {num_windows}"
        )
    return min(num_windows - 1, max(1, round(share * num_windows)))


@dataclass(frozen=True)
class LayerFit:
    """What the correction of one layer did."""

    layer: int
    """In the dense model, counted from 0."""
    projection: str | None
    strength: float | None
    relative_error: float
    """Squared error of the states on unseen tokens, as a share of that without the correction."""


Batches = Sequence[Tensor | Mapping[str, Tensor]]


@torch.no_grad()
def correct(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    kept: Sequence[int],
    fitted: Batches,
    unseen: Batches,
    *,
    settings: Settings | None = None,
    progress: bool = True,
) -> RecoveryOutcome:
    """Correct the output projections of a pruned model, in place.

    States of both models at one depth are kept for all tokens: twice tokens × hidden_size values in
    the model's dtype, beside one Gram matrix of 8 · in_features² bytes for each part of the text.

    Args:
        model: the dense model, not changed.
        pruned: the model without the layers that are not in `kept`; see `copies.pruned_copy`.
        kept: layers of the dense model that `pruned` has, in order.
        fitted, unseen: disjoint text to fit and to choose by: token ids `(batch, sequence)`, or
            mappings with `input_ids` and, where padded, `attention_mask`.
        settings: None takes the defaults.
        progress: show a bar.

    Raises:
        SimdiffError: no layer that can be corrected, too little text, NaN or Inf.
    """
    settings = settings or Settings()
    texts = model_inputs(fitted), model_inputs(unseen)
    run = Correction(model, pruned, list(kept), *texts, settings)
    run.check()
    with depths(model, pruned, autocast=autocasts(model)) as (dense, student):
        positions = range(run.first, len(kept))
        for position in track(positions, "correct layers") if progress else positions:
            run.layer(position, dense, student)
    if not any(fit.projection for fit in run.fits):
        raise SimdiffError(
            f"closed-form recovery needs a layer of {type(model).__name__} whose last linear map "
            "writes to the residual stream, got none: with a mixture of experts each token takes "
            "its own; another method may do"
        )
    return run.choose()


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
class _Change:
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
    corrections: list[_Change] = field(default_factory=list)
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
        if projection is None:
            return LayerFit(self.kept[position], None, None, 1.0)
        fitted, unseen = self._equations(projection), self._equations(projection)
        with entering(projection) as seen:
            for index, batch in enumerate(self.batches):
                output = student.run(batch, self.states[index], position, position + 1)
                equations = fitted if index < len(self.fitted) else unseen
                rows = token_mask(batch).to(output.device)
                self._update(equations, projection, seen, output, self.targets[index], rows)
        fit = best_ridge(fitted, unseen, self.settings.strengths)
        self._apply(position, projection, fit)
        return LayerFit(self.kept[position], projection.name, fit.strength, fit.relative_error)

    def _equations(self, projection: OutputProjection) -> NormalEquations:
        hidden_size = int(self.states[0].shape[-1])
        features = projection.in_features + projection.has_bias
        return NormalEquations(features, hidden_size, self.states[0].device)

    def _update(
        self,
        equations: NormalEquations,
        projection: OutputProjection,
        seen: list[tuple[Tensor, Tensor]],
        output: Tensor,
        target: Tensor,
        rows: Tensor,
    ) -> None:
        """Add one batch: features and residuals such that the residual is linear in them."""
        features, written = (tensor.reshape(len(rows), -1)[rows].double() for tensor in seen[0])
        wanted = target.reshape(len(rows), -1)[rows].double()
        residuals = (wanted - output.reshape(len(rows), -1)[rows].double()) / projection.scale
        if projection.has_bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if projection.gain is not None:  # to first order: how rms(o) changes is left out
            features = features / rms(written)
            gain = projection.gain.to(residuals.device)
            residuals = residuals / gain.where(gain.abs() > 1e-3 * gain.abs().max(), torch.inf)
        norms = wanted.norm(dim=1)
        weights = torch.where(norms > 0, norms, torch.inf) ** -self.settings.norm_power
        equations.update(features, residuals, weights)

    def _apply(self, position: int, projection: OutputProjection, fit: Fit) -> None:
        if fit.correction is None:
            return
        module = projection.module
        old = dict(module._parameters)
        projection.correct(fit.correction)
        new = dict(module._parameters)
        self.corrections.append(_Change(position, module, old, new))

    def choose(self) -> RecoveryOutcome:
        """Keep the corrections down to the depth of lowest loss on the unseen windows."""
        cuts = [
            c + 1
            for c, correction in enumerate(self.corrections)
            if self.target_depth(correction.position) != self.kept[correction.position] + 1
        ]
        depths = sorted({0, *cuts, len(self.corrections)})
        losses = {count: self._loss(count) for count in depths}
        best = min(depths, key=lambda count: losses[count])
        self._keep(best)
        notes: tuple[str, ...] = ()
        if best == 0:
            notes = (
                "no correction lowered the loss on unseen calibration windows: the weights "
                "are those of the plain cut",
            )
        return RecoveryOutcome(
            formula="W + Vᵀ for the last linear map of the layers from the first cut on, layer by "
            "layer, V = argmin Σ w ‖h − y − Vᵀz‖² + λ‖V‖²",
            settings=asdict(self.settings),
            details={
                "layers": [asdict(fit) for fit in self.fits],
                "losses": [{"corrected": count, "nll": losses[count]} for count in depths],
                "corrected": best,
            },
            notes=notes,
        )

    def _keep(self, count: int) -> None:
        """Apply the first corrections and take back the others."""
        for index, correction in enumerate(self.corrections):
            chosen = correction.new if index < count else correction.old
            correction.module._parameters.update(chosen)

    def _loss(self, count: int) -> float:
        """Mean negative log-likelihood per token of the unseen windows."""
        self._keep(count)
        total, tokens = 0.0, 0
        for batch in self.unseen:
            for row in range(len(batch["input_ids"])):
                rows = {name: value[row : row + 1] for name, value in batch.items()}
                ids = rows["input_ids"][token_mask(rows).view(1, -1)][None]
                if ids.shape[1] > 1:
                    with precision(self.pruned):
                        total += window_loss(self.pruned, ids) * (ids.shape[1] - 1)
                    tokens += ids.shape[1] - 1
        if not math.isfinite(total) or not tokens:
            found = f"{total} over {tokens} tokens"
            raise SimdiffError(f"correct: unseen must give a finite loss, got {found}")
        return total / tokens
