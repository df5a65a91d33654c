"""Correct a pruned model layer by layer, so that its states come closer to the dense model's."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.data.batches import token_mask
from simdiff.errors import SimdiffError
from simdiff.models.partial_forward import PartialForward
from simdiff.models.structure import find_decoder_layers
from simdiff.recovery.closed_form.changes import Change, changing
from simdiff.recovery.closed_form.normal_equations import Fit
from simdiff.recovery.closed_form.precision import precision
from simdiff.recovery.closed_form.projections import (
    InputMap,
    OutputProjection,
    find_inner_parts,
    find_projection,
    recorded_calls,
)
from simdiff.recovery.closed_form.regression import Regression
from simdiff.recovery.closed_form.settings import LayerFit, PartFit, Settings

# Tokens on which the linear map of a layer is looked for.
_PROBED = 32


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
    corrections: list[list[Change]] = field(default_factory=list)
    """What was changed in each corrected layer."""
    targets: BatchStates = field(default_factory=list)
    """For each batch, the dense states that enter the next kept layer."""
    states: BatchStates = field(default_factory=list)
    """For each batch, the states that enter the current layer of the model corrected so far."""
    branches: dict[int, BatchStates] = field(default_factory=dict)
    """For a number of corrections, the same states of the unseen batches with these alone."""
    positions: list[int] = field(default_factory=list)
    """The positions of the layers with a correction."""
    changes: list[Change] = field(default_factory=list)
    """What was changed so far in the layer that is being corrected."""
    parts: list[PartFit] = field(default_factory=list)
    """What was found within it."""

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """All batches: those to fit, then the unseen ones."""
        return [*self.fitted, *self.unseen]

    @property
    def first(self) -> int:
        """Position of the last layer before the first cut; 0 if layer 0 is cut."""
        gap = next((i for i, layer in enumerate(self.kept) if layer != i), len(self.kept))
        return max(0, gap - 1)

    @property
    def last(self) -> int:
        """Position of the last layer that is corrected."""
        return max(self._corrected, default=self.first)

    def corrects(self, position: int) -> bool:
        """Whether the layer at a position is the last before a cut, or one of the few behind it."""
        return position in self._corrected

    @functools.cached_property
    def _corrected(self) -> frozenset[int]:
        every = range(len(self.kept))
        cuts = [position for position in range(-1, len(self.kept)) if self.closes_cut(position)]
        near = (range(cut, cut + 1 + self.settings.after_cut) for cut in cuts)
        return frozenset(itertools.chain(*near)) & frozenset(every)

    @functools.cached_property
    def _depth(self) -> int:
        """Number of the dense model's layers."""
        return len(find_decoder_layers(self.model))

    def follows_cut(self, position: int) -> bool:
        """Whether a cut lies before a position, so that other states enter it than the dense."""
        return self.kept[position] != position

    def target_depth(self, position: int) -> int:
        """Index of the dense layer whose input the layer at a position should reproduce."""
        following = position + 1
        return self.kept[following] if following < len(self.kept) else self._depth

    def check(self) -> None:
        """Refuse text that consists only of padding."""
        for name, batches in (("fitted", self.fitted), ("unseen", self.unseen)):
            if not any(bool(token_mask(batch).any()) for batch in batches):
                raise SimdiffError(f"correct: {name} must leave some token, got none")

    @property
    def num_steps(self) -> int:
        """How often `begin` and the `layer` of all positions yield together."""
        return len(self.batches) + len(self.course) * (3 * len(self.batches) + 1)

    @property
    def course(self) -> range:
        """The positions from the first layer that is corrected to the last."""
        return range(self.first, self.last + 1)

    def begin(self, dense: PartialForward, student: PartialForward) -> Iterator[None]:
        """Take the states to the first layer that is corrected; yields after each batch."""
        targets, states = [], []
        for batch in self.batches:
            targets.append(dense.run(batch, None, 0, self.kept[self.first]))
            # Where layer 0 is cut, the dense states are already further.
            cut = self.follows_cut(self.first)
            states.append(student.run(batch, None, 0, self.first) if cut else targets[-1])
            yield
        self.targets, self.states = targets, states

    def layer(
        self, position: int, dense: PartialForward, student: PartialForward
    ) -> Iterator[None]:
        """Correct one layer and advance the states past it; yields after each batch, and solved.

        Positions are given in the order of `course`; behind it there is nothing to do but `finish`.
        """
        start = self.kept[position]
        yield from self.prepare(position, dense, student)
        stop = self.target_depth(position)
        for index, batch in enumerate(self.batches):
            self.targets[index] = dense.run(batch, self.targets[index], start, stop)
            yield
        yield from self.fit(position, student)
        yield

    def finish(self, student: PartialForward) -> None:
        """Take the unseen batches past all layers behind the last one that is corrected."""
        for states in (self.states, *self.branches.values()):
            for number in self.unseen_numbers:
                entered = states[number]
                states[number] = student.run(
                    self.batches[number], entered, self.last + 1, len(self.kept)
                )

    def advance(self, position: int, student: PartialForward) -> None:
        """Take the branches past a layer that is as it was."""
        for count, states in self.branches.items():
            self.branches[count] = self._leaving(position, count)
            for number in self.unseen_numbers:
                self.branches[count][number] = self._run(student, position, number, states)

    def prepare(
        self, position: int, dense: PartialForward, student: PartialForward
    ) -> Iterator[None]:
        """Correct what lies within a layer before its end, once the states that enter it are there.

        Args:
            position: of the layer in the pruned model.
            dense: runs the dense layer.
            student: runs the layer.
        """
        done = len(self.positions)
        if self.corrects(position) and (
            not done or self.closes_cut(self.positions[-1]) or not self.corrects(position - 1)
        ):
            self.branches[done] = self.states
        self.advance(position, student)
        parts = self._inner_parts(position, student)
        for index, part in enumerate(parts):
            for number in self._fit_part(position, part, dense, student):
                if (index * len(self.batches) + number + 1) % len(parts) == 0:
                    yield
        if not parts:
            yield from itertools.repeat(None, len(self.batches))

    def fit(self, position: int, student: PartialForward) -> Iterator[None]:
        """Correct the layer at a position; its batches' states become those that leave it.

        Args:
            position: of the layer in the pruned model; `targets` and `states` are there.
            student: runs the layer.
        """
        found = yield from self._fit(position, student)
        if self.corrects(position):
            self.fits.append(found)

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

    def _run(
        self, student: PartialForward, position: int, number: int, states: BatchStates
    ) -> Tensor:
        index = self._index(position)
        return student.run(self.batches[number], states[number], index, index + 1)

    def _probe(
        self, position: int, student: PartialForward
    ) -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
        """A layer, what runs it on a few tokens, and the states of these that enter it."""
        index = self._index(position)
        few = {name: value[:1, :_PROBED] for name, value in self.batches[0].items()}
        some = self.states[0][:1, :_PROBED]
        return student.layers[index], lambda: student.run(few, some, index, index + 1), some

    def _inner_parts(
        self, position: int, student: PartialForward
    ) -> list[InputMap | OutputProjection]:
        if not self.corrects(position) or not self.follows_cut(position):
            return []
        layer, run, some = self._probe(position, student)
        found = find_inner_parts(layer, run, int(some.shape[-1]))
        return [part for part in found if not any(map(self._tied, part.modules))]

    def _fit_part(
        self,
        position: int,
        part: InputMap | OutputProjection,
        dense: PartialForward,
        student: PartialForward,
    ) -> Iterator[int]:
        """Correct a part, so that what enters it, or the stream behind it, is as in the dense."""
        regression = self._regression(part)
        index, own = self._index(position), self.kept[position]
        for number, batch in enumerate(self.batches):
            with self.as_it_was():
                wanted = dense.entering_module(batch, self.targets[number], own, part.place)
            with recorded_calls(part) as seen:
                found = student.entering_module(batch, self.states[number], index, part.place)
            self._update(regression, number, seen, found, wanted)
            yield number
        fit = regression.solve(self._last_strength(part.names))
        self._change(part, fit)
        self.parts.append(PartFit(part.names, fit.strength, fit.relative_error))

    def _regression(self, part: InputMap | OutputProjection) -> Regression:
        regression = Regression(part, self.settings, self.states[0])
        self.most_features = max(self.most_features, regression.width)
        return regression

    def _update(
        self,
        regression: Regression,
        number: int,
        seen: list[tuple[Tensor, Tensor]],
        found: Tensor,
        wanted: Tensor,
    ) -> None:
        rows = token_mask(self.batches[number]).flatten()
        fitted = number < len(self.fitted)
        regression.update(seen[0] if seen else None, found, wanted, rows, fitted=fitted)

    def _change(self, part: InputMap | OutputProjection, fit: Fit) -> Change | None:
        if fit.correction is None:
            return None
        with changing(part.modules, self.changes):
            part.correct(fit.correction)
        return self.changes[-1]

    def _fit(self, position: int, student: PartialForward) -> Generator[None, None, LayerFit]:
        def run(number: int) -> Tensor:
            return self._run(student, position, number, entering)

        entering, own = self.states, self.kept[position]
        parts = tuple(self.parts)
        self.parts.clear()
        projection = None
        if self.corrects(position):
            layer, probe, some = self._probe(position, student)
            projection = find_projection(layer, probe, int(some.shape[-1]))
        if projection is None or self._tied(projection.module):
            leaving = self._leaving(position)
            for number in range(len(self.batches)):
                leaving[number] = run(number)
                yield
            self.states = leaving
            self._keep(position)
            return LayerFit(own, None, None, None, 1.0, parts)
        regression = self._regression(projection)
        held: list[tuple[Tensor, Tensor | None] | None] = []
        with recorded_calls(projection) as seen:
            for number in range(len(self.batches)):
                output = run(number)
                self._update(regression, number, seen, output, self.targets[number])
                both = output, seen[0][0] if projection.gain is None else None
                held.append(both if self._holds(*both) else None)
                yield
        fit = regression.solve(self._last_strength(projection.names))
        self._leave(position, run, held, projection, self._change(projection, fit))
        self._keep(position)
        return LayerFit(
            own, projection.name, regression.kind, fit.strength, fit.relative_error, parts
        )

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The layer that is being corrected before any change, inside a with block."""
        with contextlib.ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change.undone())
            yield

    def _keep(self, position: int) -> None:
        """Take what was changed in a layer, if anything was."""
        if self.changes:
            self.corrections.append(self.changes)
            self.positions.append(position)
            self.changes = []

    def _leave(
        self,
        position: int,
        run: Callable[..., Tensor],
        held: list[tuple[Tensor, Tensor | None] | None],
        projection: OutputProjection,
        change: Change | None,
    ) -> None:
        """Take the states past a layer: those that left it before, and what its change adds."""
        leaving = self._leaving(position)
        again = change is not None and projection.gain is not None
        undone = contextlib.nullcontext if change is None else change.undone
        for number in range(len(held)):
            if again:  # a norm follows: what is added depends on all of the output
                leaving[number], held[number] = run(number), None
                continue
            if held[number] is None:
                with undone(), recorded_calls(projection) as seen:
                    held[number] = run(number), seen[0][0]
            states, entered = held[number] or (None, None)
            held[number] = None
            assert states is not None
            if change is not None and entered is not None:
                with precision(self.pruned):
                    added = projection.added(change.old, entered)
                states += added.reshape(states.shape).to(states)
            leaving[number] = states
        self.states = leaving

    def _last_strength(self, names: tuple[str, ...]) -> float | None:
        """The strength of the last correction of these: that of the next is seldom far."""
        known = (fit.strengths.get(names) for fit in reversed(self.fits))
        return next(filter(None, known), None)

    def _tied(self, module: nn.Module) -> bool:
        """Whether other modules share a module's weight."""
        held = [p for m in self.pruned.modules() for p in m._parameters.values()]
        return sum(parameter is module.weight for parameter in held) > 1

    def keep(self, count: int) -> None:
        """Apply the corrections of the first `count` layers and undo the others."""
        for index, changes in enumerate(self.corrections):
            for change in changes:
                chosen = change.new if index < count else change.old
                change.module._parameters.update(chosen)

    def closes_cut(self, position: int) -> bool:
        """Whether the layer at a position is the last one before a cut; -1 is before all layers."""
        own = self.kept[position] if position >= 0 else -1
        return self.target_depth(position) != own + 1
