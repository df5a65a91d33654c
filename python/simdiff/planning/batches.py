"""Divergences of many plans from the dense model at once, as the search of an effort asks."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.divergence import Teacher
from simdiff.evaluation.streamed_losses import losses_of
from simdiff.io import ranks
from simdiff.models.partial_forward import Course
from simdiff.models.streamed import stream_of
from simdiff.models.windows import check_windows
from simdiff.planning.bypass import BypassEvaluator, check_unwritten

Plan = tuple[int, ...]
Runs = Mapping[tuple[Plan, int], Tensor | None]
"""For each plan and window divergence and loss, `(2, num_runs)`, means of runs of tokens; None
excludes a plan."""
Ask = Callable[[Sequence[Plan], Sequence[int]], Runs]
"""Takes plans and windows, and returns the runs of all plans on all windows."""

# Number of tokens of a run, whose mean is one observation: neighbours are not independent.
RUN_OF_TOKENS = 32
# Least number of runs in a window of enough tokens.
_FEWEST_RUNS = 8


def runs_of(tokens: Tensor) -> Tensor:
    """The means of runs of neighbouring tokens, the last dimension, float64 on the CPU."""
    length = tokens.shape[-1]
    count = max(1, min(_FEWEST_RUNS, length), length // RUN_OF_TOKENS)
    parts = tokens.double().cpu().tensor_split(count, -1)
    return torch.stack([run.mean(-1) for run in parts], -1)


def some_logits(model: PreTrainedModel, ids: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Logits `(num_tokens, vocabulary)` after every stride-th token, and the ids that come next.

    Args:
        model: a causal language model.
        ids: token ids `(1, window_length)`.
        stride: 1 for all tokens.
    """
    ids = ids.to(model.get_input_embeddings().weight.device)
    read = torch.arange(min(stride, ids.shape[1] - 1) - 1, ids.shape[1] - 1, stride)
    if stride > 1 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = read.to(ids.device)
        found: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
        return found, ids[0, kept + 1]
    every: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return every[read.to(every.device)], ids[0, read.to(ids.device) + 1]


class BatchReader(BypassEvaluator):
    """Reads many plans on a window of a model in memory; each state that they share is made once.

    Args:
        model: the dense model.
        windows: token ids `(num_windows, window_length)` of calibration text.
        stride: of how many tokens the head reads one.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, stride: int = 1) -> None:
        """Prepare; nothing is run yet."""
        super().__init__(model, windows)
        self._stride = stride
        self._teachers: dict[int, Teacher] = {}

    def __call__(self, plans: Sequence[Plan], windows: Sequence[int]) -> Runs:
        """The measures of all plans on all windows, shared among processes; may be NaN."""
        ordered = sorted(plans, key=lambda plan: (*plan, math.inf))
        wanted = list(itertools.product(windows, ordered))
        mine = [wanted[index] for index in ranks.part(len(wanted))]

        def run() -> list[Tensor]:
            groups = itertools.groupby(mine, key=lambda item: item[0])
            with self._ready(()):
                return [
                    runs_of(measures)
                    for window, items in groups
                    for measures in self._of_window(window, [plan for _, plan in items])
                ]

        found = [runs for part in ranks.all_of(run) for runs in part]
        return {(plan, w): runs for (w, plan), runs in zip(wanted, found, strict=True)}

    def _of_window(self, window: int, plans: Sequence[Plan]) -> Iterator[Tensor]:
        """The measures of sorted plans, one after the other.

        A state that enters layer k of a plan is that of the next plan where both remove the same
        layers before k. Where a plan follows all that remove more after its last layer, those that
        share a beginning are neighbours, and the deepest shared state is the last one made.
        """
        dense, teacher = self._base_states(window), self._teacher(window)
        branches = [
            self.layer_of(min({*plan} ^ {*following}))
            for plan, following in itertools.pairwise(plans)
        ]
        shared: dict[int, tuple[Tensor, int]] = {}
        for index, plan in enumerate(plans):
            first = self.layer_of(min(plan)) if plan else self.num_layers
            usable = {layer: state for layer, state in dense.items() if layer <= first} | shared
            start = max(usable, default=0)
            needed = itertools.accumulate(branches[index:], min)  # later plans branch off there
            keep = {layer for layer in needed if max(start, first) < layer < self.num_layers}
            course = Course(start, kept=dict.fromkeys(keep))
            with self.without(plan, course):
                logits, _ = self._logits(window, course, usable)
            yield teacher.measures(logits)
            made = {layer: state for layer, state in course.kept.items() if state is not None}
            branch = branches[index] if index < len(branches) else 0
            shared = {k: state for k, state in (shared | made).items() if k <= branch}

    def layer_of(self, unit: int) -> int:
        """The decoder layer in which a unit of a plan lies; here units are layers."""
        return unit

    @contextlib.contextmanager
    def without(self, plan: Plan, course: Course) -> Iterator[None]:
        """Inside the with block, a forward along the course is without the units of a plan."""
        course.passed_by = frozenset(plan)
        yield

    def _teacher(self, window: int) -> Teacher:
        if window not in self._teachers:
            found = self._logits(window, Course(), self._base_states(window))
            self._teachers[window] = Teacher.of_logits(*found)
        return self._teachers[window]

    def _logits(
        self, window: int, course: Course, usable: Mapping[int, tuple[Tensor, int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits from the deepest usable state on, see `some_logits`."""
        course.start = max(usable, default=0)
        entering, version = usable.get(course.start, (None, 0))
        course.states = entering
        with self._partial.following(course):
            found = some_logits(self._model, self._windows[window], self._stride)
        check_unwritten(course.start, entering, version)
        return found


class StreamedReader:
    """What `BatchReader` is for a streamed model; what is not known yet is read in one pass.

    Use it inside `simdiff.evaluation.streamed_losses.in_few_passes`.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, stride: int = 1) -> None:
        """Prepare; nothing is run yet."""
        check_windows(model, [windows], "perplexity")
        self._stride = stride
        self._losses = losses_of(model, self._measures, "divergence")
        self._windows = [self._losses.window(ids) for ids in windows]
        self._read: dict[bytes, Teacher] = {}

    def __call__(self, plans: Sequence[Plan], windows: Sequence[int]) -> Runs:
        """See `BatchReader`.

        Raises:
            SimdiffError: something is not known yet, and was asked for.
        """
        wanted = itertools.product(sorted({(), *plans}), windows)
        found = {
            (plan, window): self._losses.get(plan, self._windows[window]) for plan, window in wanted
        }
        if any(tokens is None for tokens in found.values()):
            raise SimdiffError("losses of plans are not known yet")
        return {
            (plan, window): runs_of(tokens if plan else _of_dense(tokens))
            for (plan, window), tokens in found.items()
            if tokens is not None and plan in plans
        }

    def _measures(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Of a window's tokens; of the dense model, which a pass reads first, its distribution."""
        logits, targets = some_logits(model, ids[None], self._stride)
        key, known = ids.cpu().numpy().tobytes(), self._losses.known((), ids)
        if known is not None:  # of an earlier pass
            self._read[key] = Teacher.unpacked(known[:, :-2].to(logits.device))
        if key not in self._read:
            self._read[key] = Teacher.of_logits(logits, targets)
            measures = self._read[key].measures(logits)
            return torch.cat([self._read[key].packed(), measures.T], 1)
        return self._read[key].measures(logits)


def _of_dense(packed: Tensor) -> Tensor:
    """Divergence and loss of the dense model, which lie behind its distribution."""
    return packed[:, -2:].T


def reader_of(model: PreTrainedModel, windows: Tensor, stride: int) -> BatchReader | StreamedReader:
    """What reads the plans of a search, in memory or streamed."""
    if stream_of(model) is None:
        return BatchReader(model, windows, stride)
    return StreamedReader(model, windows, stride)
