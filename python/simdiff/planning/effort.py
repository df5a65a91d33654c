"""A plan by the search of `--effort normal` or `thorough`: budget, beginning and record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.evaluation.journal import evaluation_key
from simdiff.planning.batches import Ask, Plan, Runs, reader_of
from simdiff.planning.block_costs import block_costs
from simdiff.planning.choice import kept_choice
from simdiff.planning.cost import Cost, Prices, head_stride, prices_of
from simdiff.planning.criteria import importance
from simdiff.planning.effort_search import EffortSearch
from simdiff.planning.kept_runs import KeptRuns
from simdiff.planning.names import EFFORTS
from simdiff.planning.shortlist import EXPONENT, Candidate, shortlist
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import SurgeryError, layers_removed

# Share of the cost of greedy search that a search may always spend: few layers to remove and much
# calibration text leave less.
LEAST_SHARE = 1 / 20


@dataclass(frozen=True)
class Found:
    """The plan of a search, those among which it chose, and what it cost."""

    best: Candidate
    candidates: list[Candidate]
    agreement: float | None
    """Share of draws in which no other plan of the last choice is better, see `kept_choice`."""
    record: dict[str, Any]


@dataclass(frozen=True)
class SearchSpace:
    """What a search may remove, and what it knows before it reads anything."""

    prices: Prices
    reader: Callable[[int], Ask]
    """Takes of how many tokens the head reads one, and makes what reads plans."""
    expressible: Callable[[Plan], bool]
    """Whether the model can be without these units."""
    first: Sequence[int]
    """All units that may go, the most promising first."""
    starts: Sequence[Candidate]
    """Plans of scores, of as many units as go."""
    cost_of: Callable[[Plan], float]
    """By scores."""
    scored: Cost
    """Of the calibration pass."""
    protect: Collection[int] = ()
    """Units that stay."""
    max_blocks: int | None = None
    """Upper limit of the number of separate blocks."""


def search_with_effort(
    model: PreTrainedModel,
    scores: LayerScores,
    windows: Tensor,
    num_remove: int,
    effort: str,
    *,
    evaluation_windows: int,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
    journal: Path | None = None,
) -> Found:
    """Search for the layers to remove.

    Args:
        model: the dense model.
        scores: of it, with blocks.
        windows: token ids `(num_windows, window_length)` of calibration text.
        num_remove: number of layers to remove.
        effort: "normal" or "thorough".
        evaluation_windows: that the greedy search reads of whose cost this takes a share.
        protect: layers that stay.
        max_blocks: upper limit of the number of separate blocks.
        journal: file that keeps what was read; None keeps nothing. It is not removed at the end.

    Raises:
        SimdiffError: no plan has a finite loss.
    """
    windows = read_windows(windows, effort)
    space = SearchSpace(
        prices=prices_of(model),
        reader=partial(reader_of, model, windows),
        expressible=partial(_expressible, model),
        first=promising(scores),
        starts=shortlist(scores, num_remove, protect, max_blocks=max_blocks),
        cost_of=block_costs(scores).raised(EXPONENT).plan_cost,
        scored=Cost(layers=scores.num_layers) * round(scores.num_tokens / windows.shape[1]),
        protect=protect,
        max_blocks=max_blocks,
    )
    key = evaluation_key(model, windows, scores.calibration) if journal else {}
    return search_in(space, windows, num_remove, effort, evaluation_windows, journal, key)


def read_windows(windows: Tensor, effort: str) -> Tensor:
    """The windows that a search may read: states are kept of all of them."""
    chosen = EFFORTS[effort]
    assert chosen is not None
    return windows[: chosen.windows]


def search_in(
    space: SearchSpace,
    windows: Tensor,
    num_remove: int,
    effort: str,
    evaluation_windows: int,
    journal: Path | None,
    key: Mapping[str, Any],
) -> Found:
    """Search in a space, see `search_with_effort`; `key` is what readings depend on."""
    chosen = EFFORTS[effort]
    assert chosen is not None
    whole, scored = space.prices, space.scored
    stride = head_stride(whole)
    prices = replace(whole, head=whole.head / stride)
    greedy = whole.total(whole.greedy(num_remove, evaluation_windows))
    least = greedy * min(LEAST_SHARE, chosen.share)
    reader = space.reader(stride)
    refused: dict[Plan, bool] = {}

    def ask(plans: Collection[Plan], read: Collection[int]) -> Runs:
        cut = [plan for plan in plans if len(plan) == num_remove]
        for plan in cut:
            if plan not in refused:
                refused[plan] = not space.expressible(plan)
        possible = [plan for plan in plans if not refused.get(plan)]
        found = reader(possible, list(read))
        return {(plan, window): found.get((plan, window)) for plan in plans for window in read}

    known = KeptRuns(ask, journal, key)
    search = EffortSearch(
        known,
        prices,
        chosen,
        budget=max(chosen.share * greedy - prices.total(scored), least),
        num_windows=len(windows),
        tokens=max(1, (windows.shape[1] - 1) // stride),
        cost_of=space.cost_of,
        protect=space.protect,
        max_blocks=space.max_blocks,
    )
    with known.kept():
        best = search.run(num_remove, space.first, space.starts)
    spent = search.spent
    record = {
        "effort": effort,
        "objective": "divergence from the dense model and rise of the loss, nats per token",
        "windows_read": spent.reads,
        "layers_run": spent.cost.layers,
        "heads_run": spent.cost.heads,
        "calibration_layers_run": scored.layers,
        "head_in_layers": round(whole.head, 3),
        "head_stride": stride,
        "share_of_greedy": round(prices.total(spent.cost + scored) / greedy, 4),
        "greedy_windows": evaluation_windows,
    }
    agreement = kept_choice(search.gains(best.removed))
    return Found(best, search.candidates(num_remove), agreement, record)


def promising(scores: LayerScores) -> list[int]:
    """All layers, those first that either the cost or block influence would remove early."""
    costs = block_costs(scores).values
    layers = range(scores.num_layers)
    by_cost = _places([costs[layer][layer + 1] for layer in layers])
    by_influence = _places(importance(scores, "block-influence").values)
    return sorted(layers, key=lambda k: (min(by_cost[k], by_influence[k]), by_cost[k]))


def _places(values: Collection[float]) -> list[int]:
    values = list(values)
    order = sorted(range(len(values)), key=lambda k: (values[k], k))
    return [order.index(k) for k in range(len(values))]


def _expressible(model: PreTrainedModel, plan: Plan) -> bool:
    try:
        with layers_removed(model, plan):  # raises if stock classes cannot express the cut
            return True
    except SurgeryError:
        return False
