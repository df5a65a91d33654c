"""Losses of a streamed model without some layers: many plans in one pass over the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError, number_of
from simdiff.io import ranks
from simdiff.io.outputs import new_file
from simdiff.io.progress import silent, tell, track
from simdiff.models.partial_forward import Course
from simdiff.models.state_files import DONE
from simdiff.models.streamed import stream_of
from simdiff.models.sweep import Plan, Sweep

Result = TypeVar("Result")
Losses = Mapping[Plan, Mapping[int, Tensor]]


def losses_in_one_pass(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    plans: Mapping[Plan, Collection[int]],
    loss_of: Callable[[int], Tensor],
    *,
    purpose: str,
) -> Losses:
    """The losses of some windows without the layers of each plan; every weight is read once.

    Args:
        model: a streamed model.
        windows: token ids `(1, window_length)`, of any lengths.
        plans: sets of removed layers, each with the indices of its windows.
        loss_of: calls the model for the window of this index, and makes token losses of its logits.
        purpose: of the pass, see `Sweep`.

    Returns:
        For each plan, the losses by window, float32 on the CPU.
    """
    if ranks.size() > 1:
        return _in_a_pass_of_each(model, windows, plans, loss_of, purpose)
    sweep = Sweep(model, [{"input_ids": ids} for ids in windows], plans, purpose=purpose)
    path = None if sweep.directory is None else sweep.directory / DONE
    if path is not None and path.exists():
        return _loaded(safetensors.torch.load_file(path))
    found: dict[Plan, dict[int, Tensor]] = {}
    with sweep.finished(head=True) as partial:
        for plan, read in track(sweep.plans.items(), f"{purpose}, head", len(sweep.plans)):
            for window in read:
                course = Course(len(partial.layers), sweep.states(plan, window))
                with partial.following(course):
                    losses = loss_of(window)
                found.setdefault(plan, {})[window] = losses.float().cpu()
    if path is not None:
        with new_file(path, overwrite=True) as scratch:
            safetensors.torch.save_file(_named(found), scratch)
        sweep.drop_states()
    return found


def _in_a_pass_of_each(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    plans: Mapping[Plan, Collection[int]],
    loss_of: Callable[[int], Tensor],
    purpose: str,
) -> Losses:
    """`losses_in_one_pass` of several processes, each of which reads some of the windows."""
    mine = ranks.part(len(windows))
    own = {plan: [window for window in read if window in mine] for plan, read in plans.items()}
    own = {plan: read for plan, read in own.items() if read}

    def run() -> Losses:
        return losses_in_one_pass(model, windows, own, loss_of, purpose=purpose) if own else {}

    found: dict[Plan, dict[int, Tensor]] = {plan: {} for plan in plans}
    for losses in ranks.all_of(run):
        for plan, by_window in losses.items():
            found[plan].update(by_window)
    return found


def _named(losses: Losses) -> dict[str, Tensor]:
    return {
        f"{','.join(map(str, sorted(plan)))}:{window}": tensor.contiguous()
        for plan, by_window in losses.items()
        for window, tensor in by_window.items()
    }


def _loaded(content: Mapping[str, Tensor]) -> Losses:
    found: dict[Plan, dict[int, Tensor]] = {}
    for name, tensor in content.items():
        layers, _, window = name.partition(":")
        plan = frozenset(map(int, filter(None, layers.split(","))))
        found.setdefault(plan, {})[int(window)] = tensor
    return found


class StreamedLosses:
    """The losses that searches ask for, by plan and window; what is not known yet is collected.

    Args:
        model: a streamed model.
        loss_of: takes model and token ids `(window_length,)`; returns the loss of each token.
    """

    def __init__(
        self, model: PreTrainedModel, loss_of: Callable[[PreTrainedModel, Tensor], Tensor]
    ) -> None:
        """Know nothing yet."""
        self._model, self._loss_of = model, loss_of
        self._windows: list[Tensor] = []
        self._known: dict[tuple[Plan, int], Tensor] = {}
        self._seconds: dict[tuple[Plan, int], float] = {}
        self.asked: set[tuple[Plan, int]] = set()
        """What was asked for since whoever wants to know emptied it: plans with a window."""
        self.missing: dict[Plan, set[int]] = {}
        """What was asked for and is not known: plans and their windows."""
        self.pretended: frozenset[Plan] = frozenset()
        """Plans whose loss is taken to be 0 while it is not known; every other has none."""
        self.passes = 0

    def window(self, ids: Tensor) -> int:
        """The index of a window, `(window_length,)` token ids."""
        for index, known in enumerate(self._windows):
            if torch.equal(known, ids):
                return index
        self._windows.append(ids)
        return len(self._windows) - 1

    def known(self, removed: Collection[int], ids: Tensor) -> Tensor | None:
        """What is known of a window, by its token ids, without these layers; nothing is asked."""
        return self._known.get((frozenset(removed), self.window(ids)))

    def get(self, removed: Collection[int], window: int) -> Tensor | None:
        """The token losses of a window without these layers; None if they are not known yet."""
        plan = frozenset(removed)
        self.asked.add((plan, window))
        if (plan, window) in self._known:
            return self._known[plan, window]
        self.missing.setdefault(plan, set()).add(window)
        if plan in self.pretended:
            return torch.zeros(len(self._windows[window]) - 1)
        return None

    def read(self) -> None:
        """Find out in one pass what is missing."""
        used = sorted({window for windows in self.missing.values() for window in windows})
        place = {window: index for index, window in enumerate(used)}
        ids = [self._windows[window] for window in used]
        start = time.perf_counter()
        found = losses_in_one_pass(
            self._model,
            [one[None] for one in ids],
            {plan: {place[window] for window in read} for plan, read in self.missing.items()},
            lambda index: self._loss_of(self._model, ids[index]),
            purpose="losses of plans",
        )
        for plan, by_window in found.items():
            for index, losses in by_window.items():
                self._known[plan, used[index]] = losses
        asked = [(plan, window) for plan, read in self.missing.items() for window in read]
        self._seconds |= dict.fromkeys(asked, (time.perf_counter() - start) / len(asked))
        self.missing = {}
        self.passes += 1

    def seconds(self, plan: Plan, window: int) -> float:
        """The share of a window and a plan in the time of the pass that read them, 1 / number."""
        return self._seconds.get((plan, window), 0.0)


_ATTRIBUTE = "_simdiff_losses"


def losses_of(
    model: PreTrainedModel,
    loss_of: Callable[[PreTrainedModel, Tensor], Tensor],
    kind: str = "loss",
) -> StreamedLosses:
    """The losses of a kind of a streamed model, the same object for all who ask."""
    kinds: dict[str, StreamedLosses] = vars(model).setdefault(_ATTRIBUTE, {})
    return kinds.setdefault(kind, StreamedLosses(model, loss_of))


def kinds_of(model: PreTrainedModel) -> list[StreamedLosses]:
    """The losses of all kinds that were asked for of a model; none unless it is streamed."""
    return list(vars(model).get(_ATTRIBUTE, {}).values())


def in_few_passes(model: PreTrainedModel | None, search: Callable[[], Result]) -> Result:
    """Run a search that evaluates plans one after the other, with few passes over a streamed model.

    The search is run without what it asks for, as if every plan that is not known were worse than
    those that are. All that it asked for is then read in one pass, and it starts anew, until it
    asks for nothing more: its result is the one that it would have had plan by plan.

    Args:
        model: any model; the search simply runs unless it is a streamed one.
        search: deterministic; it gets its losses by `losses_of`, and may be run many times.

    Raises:
        SimdiffError: of the search, once everything that it asked for is known.
    """
    if model is None or stream_of(model) is None:
        return search()
    while True:
        before = sum(losses.passes for losses in kinds_of(model))
        result, error = None, None
        with silent():
            try:
                result = search()
            except SimdiffError as found:
                error = found
        missing = [losses for losses in kinds_of(model) if losses.missing]
        if not missing:
            if error is not None:
                raise error
            if before:
                tell(f"{number_of(before, 'pass')} over the weights so far")
            return result  # type: ignore[return-value]
        for losses in missing:
            losses.read()
