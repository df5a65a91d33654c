"""Correct a pruned model layer by layer, so that its states come closer to the dense model's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.data.batches import token_mask
from simdiff.errors import SimdiffError
from simdiff.models.partial_forward import PartialForward
from simdiff.models.structure import find_decoder_layers
from simdiff.recovery.closed_form.normal_equations import (
    Fit,
    NormalEquations,
    UnseenTokens,
    best_ridge,
)
from simdiff.recovery.closed_form.projections import (
    OutputProjection,
    find_projection,
    recorded_calls,
    rms,
)

# Tokens on which the linear map of a layer is looked for.
_PROBED = 32

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

FEATURES = ("auto", "inputs", "outputs")


@dataclass(frozen=True)
class Settings:
    """Everything the correction depends on besides model, plan and text."""

    strengths: tuple[float, ...] = STRENGTHS
    """Ridge penalties to try, see `normal_equations.ridge`."""
    norm_power: float = 2.0
    """Exponent p of the weights ‖h‖^−p of tokens, by which massive activations do not dominate."""
    features: str = "auto"
    """Features of the correction: "inputs" z of the projection; "outputs" o = Wz, which are fewer
    and can correct less (W + VᵀW); "auto" takes outputs if inputs exceed the memory budget."""
    memory_budget: int = 8 << 30
    """Limit of the bytes of a Gram matrix and its factorisations."""
    unseen_share: float = 1 / 8
    """Share of the windows that are not fitted; they choose λ and the number of corrections."""


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


def precision(model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """Context manager with the precision of forwards that only guide the correction."""
    if not autocasts(model):
        return contextlib.nullcontext()
    device = model.get_input_embeddings().weight.device
    return torch.autocast(device.type, dtype=torch.bfloat16)


def autocasts(model: PreTrainedModel) -> bool:
    """Whether forwards multiply in bfloat16: for float32 models on devices that support it."""
    device = model.get_input_embeddings().weight.device
    if model.dtype != torch.float32:
        return False
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Change:
    """The new and the old parameters of a corrected module."""

    position: int
    """Index of the layer in the pruned model."""
    module: nn.Module
    old: dict[str, nn.Parameter | None]
    new: dict[str, nn.Parameter | None]

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """The module as it was, inside a with block."""
        self.module._parameters.update(self.old)
        try:
            yield
        finally:
            self.module._parameters.update(self.new)


class BatchStates(Protocol):
    """The hidden states of all batches at one depth, by the number of the batch."""

    def __getitem__(self, number: int, /) -> Tensor:
        """Those of a batch."""

    def __setitem__(self, number: int, states: Tensor, /) -> None:
        """Take those of a batch."""


@dataclass
class Correction:
    """A correction in progress; see `correct` for the fields."""

    model: PreTrainedModel
    pruned: PreTrainedModel
    kept: list[int]
    fitted: list[dict[str, Tensor]]
    unseen: list[dict[str, Tensor]]
    settings: Settings
    fits: list[LayerFit] = field(default_factory=list)
    most_features: int = 0
    """Largest number of features of a regression so far."""
    corrections: list[Change] = field(default_factory=list)
    targets: BatchStates = field(default_factory=list)
    """For each batch, the dense states that enter the next kept layer."""
    states: BatchStates = field(default_factory=list)
    """For each batch, the states that enter the current layer of the model corrected so far."""
    branches: dict[int, BatchStates] = field(default_factory=dict)
    """For a number of corrections, the same states of the unseen batches with these alone."""
    positions: list[int] = field(default_factory=list)
    """The positions of the layers with a correction."""

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """All batches: those to fit, then the unseen ones."""
        return [*self.fitted, *self.unseen]

    @property
    def first(self) -> int:
        """Position of the last layer before the first cut; 0 if layer 0 is cut."""
        gap = next((i for i, layer in enumerate(self.kept) if layer != i), len(self.kept))
        return max(0, gap - 1)

    def target_depth(self, position: int) -> int:
        """Index of the dense layer whose input the layer at a position should reproduce."""
        following = position + 1
        num_layers = len(find_decoder_layers(self.model))
        return self.kept[following] if following < len(self.kept) else num_layers

    def check(self) -> None:
        """Refuse text that consists only of padding."""
        for name, batches in (("fitted", self.fitted), ("unseen", self.unseen)):
            if not any(bool(token_mask(batch).any()) for batch in batches):
                raise SimdiffError(f"correct: {name} must leave some token, got none")

    @property
    def num_steps(self) -> int:
        """How often `layer` yields."""
        return 2 * len(self.batches) + 1

    def layer(
        self, position: int, dense: PartialForward, student: PartialForward
    ) -> Iterator[None]:
        """Correct one layer and advance the states past it; yields after each batch, and solved."""
        start = self.kept[position]
        if position == self.first:
            first = [dense.run(b, None, 0, start) for b in self.batches]
            self.targets, self.states = first, list(first)
            if start != position:  # layer 0 is cut, so the dense states are already further
                self.states = [student.run(b, None, 0, position) for b in self.batches]
        stop = self.target_depth(position)
        for index, batch in enumerate(self.batches):
            self.targets[index] = dense.run(batch, self.targets[index], start, stop)
            yield
        yield from self.fit(position, student)
        yield

    def fit(self, position: int, student: PartialForward) -> Iterator[None]:
        """Correct the layer at a position; its batches' states become those that leave it.

        Args:
            position: of the layer in the pruned model; `targets` and `states` are there.
            student: runs the layer.
        """
        self.fits.append((yield from self._fit(position, student)))

    def _index(self, position: int) -> int:
        """Which of the student's layers the one at a position is."""
        return position

    def _leaving(self, position: int, branch: int | None = None) -> BatchStates:
        """A place for the states that will leave the layer at a position."""
        return [torch.empty(0)] * len(self.batches)

    @property
    def unseen_numbers(self) -> range:
        """Which of all batches are unseen."""
        return range(len(self.fitted), len(self.batches))

    def _holds(self, output: Tensor, entered: Tensor | None) -> bool:
        """Whether these tensors of a batch stay in memory until the layer is solved for.

        Those that do not are computed again.
        """
        return True

    def _fit(self, position: int, student: PartialForward) -> Generator[None, None, LayerFit]:
        entering, index = self.states, self._index(position)

        def run(number: int, states: BatchStates = entering) -> Tensor:
            return student.run(self.batches[number], states[number], index, index + 1)

        for count, states in self.branches.items():
            self.branches[count] = self._leaving(position, count)
            for number in self.unseen_numbers:
                self.branches[count][number] = run(number, states)
        few = {name: value[:1, :_PROBED] for name, value in self.batches[0].items()}
        some = entering[0][:1, :_PROBED]
        projection = find_projection(
            student.layers[index],
            lambda: student.run(few, some, index, index + 1),
            int(some.shape[-1]),
        )
        if projection is None or self._tied(projection):
            leaving = self._leaving(position)
            for number in range(len(self.batches)):
                leaving[number] = run(number)
                yield
            self.states = leaving
            return LayerFit(self.kept[position], None, None, None, 1.0)
        features = self._features(projection, some)
        fitted, unseen = self._equations(projection, features, some)
        held: list[tuple[Tensor, Tensor | None] | None] = []
        with recorded_calls(projection) as seen:
            for number, batch in enumerate(self.batches):
                output, rows = run(number), token_mask(batch).flatten()
                target = self.targets[number]
                sums = fitted if number < len(self.fitted) else unseen
                like = fitted.gram
                sums.update(*self._rows(projection, seen[0], features, output, target, rows, like))
                both = output, seen[0][0] if projection.gain is None else None
                held.append(both if self._holds(*both) else None)
                yield
        fit = best_ridge(fitted, unseen, self.settings.strengths, self._last_strength())
        change = None
        if fit.correction is not None:
            if features == "outputs":
                fit = replace(fit, correction=projection.from_outputs(fit.correction))
            change = self._apply(position, projection, fit)
        self._leave(position, run, held, projection, change)
        return LayerFit(
            self.kept[position], projection.name, features, fit.strength, fit.relative_error
        )

    def _leave(
        self,
        position: int,
        run: Callable[..., Tensor],
        held: list[tuple[Tensor, Tensor | None] | None],
        projection: OutputProjection,
        change: Change | None,
    ) -> None:
        """Take the states past a layer: those that left it before, and what its change adds."""
        leaving, branch = self._leaving(position), None
        if change is not None:
            if not self.positions or self.closes_cut(self.positions[-1]):
                branch = self._leaving(position, len(self.positions))
                self.branches[len(self.positions)] = branch
            self.positions.append(position)
        undone = contextlib.nullcontext if change is None else change.undone
        for number in range(len(held)):
            parts = branch is not None and number in self.unseen_numbers
            again = change is not None and projection.gain is not None
            if held[number] is None and (parts or not again):
                with undone(), recorded_calls(projection) as seen:
                    held[number] = run(number), None if again else seen[0][0]
            states, entered = held[number] or (None, None)
            held[number] = None
            if branch is not None and parts:
                assert states is not None
                branch[number] = states.clone()
            if again:  # a norm follows: what is added depends on all of the output
                states = run(number)
            assert states is not None
            if change is not None and entered is not None:
                with precision(self.pruned):
                    added = projection.added(change.old, entered)
                states += added.reshape(states.shape).to(states)
            leaving[number] = states
        self.states = leaving

    def _last_strength(self) -> float | None:
        """The strength of the last layer that was corrected: that of the next is seldom far."""
        return next((fit.strength for fit in reversed(self.fits) if fit.strength), None)

    def _tied(self, projection: OutputProjection) -> bool:
        """Whether other modules share the projection's weight."""
        weight = projection.module.weight
        held = [p for m in self.pruned.modules() for p in m._parameters.values()]
        return sum(parameter is weight for parameter in held) > 1

    def _features(self, projection: OutputProjection, states: Tensor) -> str:
        if self.settings.features != "auto":
            return self.settings.features
        size = _exact(states).itemsize
        num_bytes = 3 * size * (projection.in_features + projection.has_bias) ** 2
        return "inputs" if num_bytes <= self.settings.memory_budget else "outputs"

    def _equations(
        self, projection: OutputProjection, features: str, states: Tensor
    ) -> tuple[NormalEquations, UnseenTokens]:
        hidden_size, dtype = int(states.shape[-1]), _exact(states)
        width = projection.in_features if features == "inputs" else hidden_size
        self.most_features = max(self.most_features, width)
        sums = NormalEquations(width + projection.has_bias, hidden_size, states.device, dtype)
        return sums, UnseenTokens(dtype)

    def _rows(
        self,
        projection: OutputProjection,
        seen: tuple[Tensor, Tensor],
        kind: str,
        output: Tensor,
        target: Tensor,
        rows: Tensor,
        like: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, residuals to fit and weights of a batch's tokens, of the dtype of `like`."""

        def counted(states: Tensor) -> Tensor:
            states = states.reshape(len(rows), -1)
            if not bool(rows.all()):
                states = states[rows.to(states.device)]
            return states.to(like)  # with several GPUs the tensors may be elsewhere

        entered, written, wanted, left = map(counted, (*seen, target, output))
        residuals = (wanted - left) / projection.scale
        features = entered if kind == "inputs" else written
        if projection.has_bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if projection.gain is not None:  # first order: rms(o) is taken as constant
            features = features / rms(written)
            gain = projection.gain.to(residuals.device)
            residuals = residuals / gain.where(gain.abs() > 1e-3 * gain.abs().max(), torch.inf)
        norms = wanted.norm(dim=1)
        weights = torch.where(norms > 0, norms, torch.inf) ** -self.settings.norm_power
        return features, residuals, weights

    def _apply(self, position: int, projection: OutputProjection, fit: Fit) -> Change:
        assert fit.correction is not None
        module = projection.module
        old = dict(module._parameters)
        projection.correct(fit.correction)
        change = Change(position, module, old, dict(module._parameters))
        self.corrections.append(change)
        return change

    def keep(self, count: int) -> None:
        """Apply the first `count` corrections and undo the others."""
        for index, correction in enumerate(self.corrections):
            chosen = correction.new if index < count else correction.old
            correction.module._parameters.update(chosen)

    def closes_cut(self, position: int) -> bool:
        """Whether the layer at a position is the last one before a cut."""
        return self.target_depth(position) != self.kept[position] + 1


def _exact(states: Tensor) -> torch.dtype:
    """Of products and sums: float64 for states of float64, else float32."""
    return torch.float64 if states.dtype == torch.float64 else torch.float32
