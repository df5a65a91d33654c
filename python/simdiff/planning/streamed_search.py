"""Searches by perplexity on a streamed model: the same plans, in few passes over its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import token_losses
from simdiff.evaluation.streamed_losses import losses_of
from simdiff.models.layer_indices import check_layers
from simdiff.models.streamed import stream_of
from simdiff.models.structure import find_decoder_layers
from simdiff.models.windows import check_windows
from simdiff.planning.bypass import BypassEvaluator

Result = TypeVar("Result")


class StreamedEvaluator:
    """What `BypassEvaluator` is for a model in memory; what is not known yet is read in one pass.

    Use it inside `simdiff.evaluation.streamed_losses.in_few_passes`.

    Args:
        model: a streamed model.
        windows: token ids `(num_windows, window_length)`.

    Raises:
        SimdiffError: the model cannot read the windows.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        """Prepare; nothing is run yet."""
        check_windows(model, [windows], "perplexity")
        self._losses = losses_of(model, token_losses)
        self._windows = [self._losses.window(ids) for ids in windows]
        self._num_layers = len(find_decoder_layers(model))

    def rebase(self, removed: Collection[int]) -> None:
        """Nothing: plans share their states by themselves."""

    def losses(self, removed: Collection[int]) -> list[float] | None:
        """Mean loss of each window without these layers; None if one is not known yet.

        Raises:
            SimdiffError: `removed` are not layers of the model, or are all layers.
        """
        found = [self.token_losses(removed, window) for window in range(len(self._windows))]
        known = [losses for losses in found if losses is not None]
        if len(known) < len(found):
            return None
        return [float(losses.double().mean()) for losses in known]

    def seconds(self, removed: Collection[int]) -> float:
        """The share that these layers' removal had in the time of passes."""
        return sum(self._losses.seconds(frozenset(removed), window) for window in self._windows)

    def token_losses(self, removed: Collection[int], window: int) -> Tensor | None:
        """Losses of the tokens of one window without these layers; None if not known yet.

        Raises:
            SimdiffError: `removed` are not layers of the model, or are all layers.
        """
        check_layers(removed, self._num_layers, "layers to pass by")
        if len(removed) >= self._num_layers:
            raise SimdiffError(
                f"losses: removed must leave a layer, got all {self._num_layers} layers"
            )
        return self._losses.get(removed, self._windows[window])


def evaluator_of(model: PreTrainedModel, windows: Tensor) -> BypassEvaluator | StreamedEvaluator:
    """What evaluates a model without layers, in memory or streamed."""
    if stream_of(model) is None:
        return BypassEvaluator(model, windows)
    return StreamedEvaluator(model, windows)


def with_starts(
    model: PreTrainedModel, starts: Sequence[Collection[int]], search: Callable[[], Result]
) -> Result:
    """Run a search that goes on from the best of some plans.

    Where it is not known which of them is the best, it asks for what it would read from each, so
    that one pass over a streamed model serves both steps.

    Args:
        model: any model.
        starts: plans, of which the search reads all first.
        search: see `simdiff.evaluation.streamed_losses.in_few_passes`.
    """
    if stream_of(model) is not None:
        losses = losses_of(model, token_losses)
        plans = {frozenset(start) for start in starts}
        for plan in plans & losses.missing.keys() or plans:
            losses.pretended = frozenset({plan})
            with contextlib.suppress(SimdiffError):
                search()
            losses.pretended = frozenset()
    return search()
