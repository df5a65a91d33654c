"""The regression by which a part of a layer is corrected."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simdiff.recovery.closed_form.normal_equations import (
    Fit,
    NormalEquations,
    UnseenTokens,
    best_ridge,
)
from simdiff.recovery.closed_form.probing import rms
from simdiff.recovery.closed_form.projections import InputMap, OutputProjection
from simdiff.recovery.closed_form.settings import Settings


class Regression:
    """The sums from which one correction is solved.

    Of a map of what modules read, features are the tensor x that enters them and residuals what
    the dense model's has more, x* − x. For a projection see `rows_of`.

    Args:
        part: what is corrected.
        settings: of the correction.
        states: some that enter the layer.
    """

    def __init__(
        self, part: InputMap | OutputProjection, settings: Settings, states: Tensor
    ) -> None:
        """Start with all sums zero."""
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        hidden_size = int(states.shape[-1])
        self.kind = "inputs"
        """What the correction is linear in."""
        self.width = hidden_size
        """Number of features, without the one of a bias."""
        bias = False
        if isinstance(part, OutputProjection):
            self.kind, bias = settings.features, part.has_bias
            if self.kind == "auto":
                num_bytes = 3 * dtype.itemsize * (part.in_features + bias) ** 2
                self.kind = "inputs" if num_bytes <= settings.memory_budget else "outputs"
            self.width = part.in_features if self.kind == "inputs" else hidden_size
        self._part, self._settings = part, settings
        self._fitted = NormalEquations(self.width + bias, hidden_size, states.device, dtype)
        self._unseen = UnseenTokens(dtype)

    def update(
        self,
        seen: tuple[Tensor, Tensor] | None,
        found: Tensor,
        wanted: Tensor,
        rows: Tensor,
        *,
        fitted: bool,
    ) -> None:
        """Add a batch.

        Args:
            seen: what entered and what left a projection; None for modules that read.
            found, wanted: what the pruned and what the dense model has where the part works.
            rows: which tokens count, `(num_tokens,)`.
            fitted: whether these tokens are fitted, or measure what a correction leaves.
        """
        sums = self._fitted if fitted else self._unseen
        like, power = self._fitted.gram, self._settings.norm_power
        if isinstance(self._part, OutputProjection):
            assert seen is not None
            sums.update(*rows_of(self._part, seen, self.kind, found, wanted, rows, like, power))
            return
        x, wanted = _counted(found, rows, like), _counted(wanted, rows, like)
        sums.update(x, wanted - x, _token_weights(wanted, power))

    def solve(self, start: float | None) -> Fit:
        """The correction, in what the part's own weights multiply; `start` as in `best_ridge`."""
        fit = best_ridge(self._fitted, self._unseen, self._settings.strengths, start)
        if fit.correction is None or self.kind == "inputs":
            return fit
        assert isinstance(self._part, OutputProjection)
        return replace(fit, correction=self._part.from_outputs(fit.correction))


def rows_of(
    projection: OutputProjection,
    seen: tuple[Tensor, Tensor],
    kind: str,
    output: Tensor,
    target: Tensor,
    rows: Tensor,
    like: Tensor,
    norm_power: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, residuals to fit and weights of a batch's tokens, of the dtype of `like`.

    Args:
        projection: what is corrected.
        seen: what entered and what left it.
        kind: "inputs" or "outputs", see `Settings.features`.
        output, target: the stream that it writes to, in the pruned and in the dense model.
        rows: which tokens count.
        like: a tensor of the dtype and on the device of the results.
        norm_power: see `Settings`.
    """
    entered, written, wanted, left = (
        _counted(states, rows, like) for states in (*seen, target, output)
    )
    residuals = (wanted - left) / projection.scale
    features = entered if kind == "inputs" else written
    if projection.has_bias:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    if projection.gain is not None:  # first order: rms(o) is taken as constant
        features = features / rms(written)
        gain = projection.gain.to(residuals.device)
        residuals = residuals / gain.where(gain.abs() > 1e-3 * gain.abs().max(), torch.inf)
    return features, residuals, _token_weights(wanted, norm_power)


def _token_weights(wanted: Tensor, norm_power: float) -> Tensor:
    norms = wanted.norm(dim=1)
    return torch.where(norms > 0, norms, torch.inf) ** -norm_power


def _counted(states: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The states of the tokens that count, `(num_tokens, width)`, of the dtype of `like`."""
    states = states.reshape(len(rows), -1)
    if not bool(rows.all()):
        states = states[rows.to(states.device)]
    return states.to(like)  # with several GPUs the tensors may be elsewhere
