"""The search of `--effort normal` and `thorough` over attention and MLP sub-layers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError, SurgeryError
from simdiff.evaluation.journal import evaluation_key
from simdiff.models.partial_forward import Course
from simdiff.models.streamed import stream_of
from simdiff.planning.batches import BatchReader, Plan
from simdiff.planning.cost import Cost, prices_of
from simdiff.planning.effort import Found, SearchSpace, read_windows, search_in
from simdiff.planning.shortlist import Candidate
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.structure import SublayerMap, find_sublayers
from simdiff.sublayers.surgery import sublayers_removed


class SublayerReader(BatchReader):
    """Reads many plans of sub-layers, which are numbered in the order of `SublayerMap.names`.

    States that plans share are those that enter a layer: both sub-layers of one run together.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, found: SublayerMap, stride: int
    ) -> None:
        """Prepare; nothing is run yet."""
        super().__init__(model, windows, stride)
        self._found = found

    def layer_of(self, unit: int) -> int:
        """The decoder layer of a sub-layer."""
        return self._found.names[unit].layer

    @contextlib.contextmanager
    def without(self, plan: Plan, course: Course) -> Iterator[None]:
        """Inside the with block the model is without the sub-layers of a plan."""
        names = [self._found.names[unit] for unit in plan]
        with contextlib.ExitStack() as stack:
            if names:
                stack.enter_context(sublayers_removed(self._model, names, self._found))
            yield


def search_with_effort(
    model: PreTrainedModel,
    scores: LayerScores,
    windows: Tensor,
    ranking: list[int],
    costs: list[float],
    starts: list[Plan],
    effort: str,
    *,
    evaluation_windows: int,
    held: Collection[int] = (),
    journal: Path | None = None,
) -> Found:
    """Search for the sub-layers to remove, as `simdiff.planning.effort` does for layers.

    Costs count sub-layers in place of layers, and greedy search is that of BlockPruner with kept
    states.

    Args:
        model: the dense model.
        scores: of it.
        windows: token ids `(num_windows, window_length)` of calibration text.
        ranking: sub-layers that may go, the least important first.
        costs: of every sub-layer; what two cost adds up.
        starts: plans of scores, all of as many sub-layers as go.
        effort: "normal" or "thorough".
        evaluation_windows: that the greedy search reads of whose cost this takes a share.
        held: sub-layers that stay.
        journal: file that keeps what was read; None keeps nothing. It is not removed at the end.

    Raises:
        SimdiffError: the model is streamed, or no plan has a finite loss.
    """
    if stream_of(model) is not None:
        raise SimdiffError(
            "a search over sub-layers needs the whole model in memory, got a streamed one"
        )
    found = find_sublayers(model)
    count = len(found.names)
    layers = prices_of(model)
    each = count / layers.num_layers
    windows = read_windows(windows, effort)
    key: dict[str, Any] = evaluation_key(model, windows, scores.calibration) if journal else {}
    space = SearchSpace(
        prices=replace(layers, num_layers=count, head=layers.head * each),
        reader=partial(SublayerReader, model, windows, found),
        expressible=partial(_expressible, model, found),
        first=ranking,
        starts=[Candidate(tuple(sorted(plan)), "the lowest by scores") for plan in starts],
        cost_of=lambda plan: sum(costs[unit] for unit in plan),
        scored=Cost(layers=count) * round(scores.num_tokens / windows.shape[1]),
        protect=held,
    )
    key |= {"sublayers": [list(name) for name in found.names]}
    return search_in(space, windows, len(starts[0]), effort, evaluation_windows, journal, key)


def _expressible(model: PreTrainedModel, found: SublayerMap, plan: Plan) -> bool:
    try:
        with sublayers_removed(model, [found.names[unit] for unit in plan], found):
            return True
    except SurgeryError:
        return False
