"""Exchange search: improve the better of two plans by exchanging single layers.

The block costs order the exchanges, and short evaluations on one calibration window decide: an
exchange is taken if it lowers the loss by more than one standard error of the paired difference
over tokens. At the end the best plans read a second window, and the lowest loss over both decides.
docs/exchange.md holds the measurements behind this, and what was tried and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.models.layer_indices import layer_runs
from simdiff.planning.blocks import BlockCosts
from simdiff.planning.choice import choice_agreement, standard_error
from simdiff.planning.shortlist import Candidate
from simdiff.planning.streamed_search import StreamedEvaluator, evaluator_of
from simdiff.surgery.layers import SurgeryError, layers_removed

Plan = tuple[int, ...]
TokenLosses = Callable[[Plan, int], Tensor | None]
"""Takes a plan and the index of a window and returns the loss of each token, one dimension; None
excludes the plan, because a loss is NaN or Inf or the model cannot express the cut."""
Ahead = Callable[[Sequence[Plan], int], None]
"""Takes plans that will be read on a window, the most certain first."""

# Share of the windows that greedy search would read for the same number of layers.
SEARCH_FRACTION = 1 / 50
# Upper limit of reads per evaluation window. 1/50 of greedy search would allow more for deep
# models, for which nothing was measured.
MAX_READS = 6
# How many finalists are compared on a second window; skipped when they would take more than a
# quarter of the reads.
FINALISTS = 3


def affordable_reads(num_layers: int, num_remove: int, search_windows: int) -> int:
    """How many times a plan may be read on one window, for `SEARCH_FRACTION` of greedy search.

    Greedy search by perplexity (SLEB, arXiv 2402.09025) evaluates L - k plans to remove layer
    k + 1, for k = 0 ... K - 1, in total L K - K (K - 1) / 2, each on all its windows. The models
    that it evaluates have more layers than a finished plan, so in layers times tokens the fraction
    is smaller: 1/54 to 1/68 for 2 to 12 of 30 layers, without the calibration pass.

    Args:
        num_layers: number of layers, L.
        num_remove: number of layers to remove, K.
        search_windows: number of windows that greedy search would read, of the same length.
    """
    evaluations = num_layers * num_remove - num_remove * (num_remove - 1) // 2
    return min(int(evaluations * search_windows * SEARCH_FRACTION), MAX_READS * search_windows)


class CutLosses:
    """Evaluates plans; it reuses the states before the first removed layer.

    Args:
        model: the dense model; it is unchanged between and after evaluations.
        windows: token ids `(num_windows, window_length)` of calibration text, never held-out text.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        """Prepare; nothing is run yet."""
        self._model, self._evaluator = model, evaluator_of(model, windows)
        # A streamed model's windows are shared among processes, see `losses_in_one_pass`.
        self._shared = not isinstance(self._evaluator, StreamedEvaluator)
        self._known: dict[tuple[Plan, int], Tensor | None] = {}

    def __call__(self, plan: Plan, window: int) -> Tensor | None:
        """See `TokenLosses`."""
        if not self._shared:
            return self._read((plan, window))
        self.ahead([plan], window)
        return self._known[plan, window]

    def ahead(self, plans: Sequence[Plan], window: int) -> None:
        """Read the first of some plans unless it is known, and others while processes are idle.

        Each of several processes reads one plan, as if no exchange were better than the plan before
        it: what follows one that is was read in vain.
        """
        if not self._shared or not plans or (plans[0], window) in self._known:
            return
        missing = [(plan, window) for plan in plans if (plan, window) not in self._known]
        some = missing[: ranks.size()]
        self._known |= zip(some, ranks.shared(self._read, some), strict=True)

    def _read(self, wanted: tuple[Plan, int]) -> Tensor | None:
        plan, window = wanted
        try:
            with layers_removed(self._model, plan):  # raises if stock classes cannot express it
                pass
        except SurgeryError:
            return None
        losses = self._evaluator.token_losses(plan, window)
        return None if losses is None else losses.cpu()


def exchange_search(
    losses: TokenLosses,
    candidates: Sequence[Candidate],
    costs: BlockCosts,
    *,
    max_reads: int,
    num_windows: int = 2,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
    ahead: Ahead | None = None,
) -> tuple[Candidate, list[Candidate], float]:
    """Improve the best candidate by exchanges, within a total number of reads.

    Of all plans that differ from the best one in one layer, the cheapest that was not tried yet is
    read next. If it is better, the search goes on from it. The search is deterministic.

    Args:
        losses: evaluates a plan on a window.
        candidates: plans to start from; all are read, even beyond `max_reads`.
        costs: block costs, raised to the power in which they add up.
        max_reads: how many times `losses` may be called.
        num_windows: number of windows of `losses`; the search reads the first, the final choice
            the second.
        protect: layers that stay.
        max_blocks: upper limit of the number of separate blocks.
        ahead: is told before each read what is read next if no exchange is better, see `CutLosses`.

    Returns:
        The best plan; all tried plans in their order, each with its `nll`; and how sure the choice
        among them is (`simdiff.planning.choice.choice_agreement`).

    Raises:
        SimdiffError: there are no candidates, or none has a finite loss.
    """
    if not candidates:
        raise SimdiffError("exchange_search: candidates must hold at least one plan, got none")
    tried = _Tried(losses)
    ahead = ahead or (lambda plans, window: None)
    starts = [candidate.removed for candidate in candidates]
    for place, candidate in enumerate(candidates):
        ahead(starts[place:], 0)
        tried.read(candidate.removed, 0, candidate.origin)
    if not tried.losses:
        raise SimdiffError(
            f"exchange_search: the loss must be finite for some candidate, got NaN, Inf or a cut "
            f"that the model cannot express for all {len(candidates)}"
        )
    start = best = min(tried.losses, key=tried.nll)
    final = FINALISTS if num_windows > 1 and max_reads >= 4 * FINALISTS else 0
    moves = _exchanges(best, costs, protect, max_blocks)
    # `best` is the start or the last plan that was better than the `best` before it, and `moves`
    # are its neighbours, cheapest first. The reads of the finalists are kept back.
    while tried.reads < max_reads - final:
        due = [move for move in moves if move not in tried.origins]
        if not due:
            break
        ahead(due[: max_reads - final - tried.reads], 0)
        move = due[0]
        if tried.read(move, 0, _origin(best, move)) and tried.better(move, best):
            best = move
            moves = _exchanges(best, costs, protect, max_blocks)
    if final:
        best = _last_choice(tried, [best, start], final, ahead)
    evaluated = tried.candidates()
    chosen = next(candidate for candidate in evaluated if candidate.removed == best)
    in_order = {plan: tried.losses[plan] for plan in tried.origins if plan in tried.losses}
    first = {tuple(sorted(candidate.removed)) for candidate in candidates}
    return chosen, evaluated, choice_agreement(in_order, first, best)


def _exchanges(
    plan: Plan, costs: BlockCosts, protect: Collection[int], max_blocks: int | None
) -> list[Plan]:
    """All plans that differ from `plan` in one layer, the cheapest first."""
    outside = [k for k in range(costs.num_layers) if k not in plan and k not in protect]
    plans = [tuple(sorted({*plan} - {back} | {gone})) for back in plan for gone in outside]
    if max_blocks is not None:
        plans = [plan for plan in plans if len(layer_runs(plan)) <= max_blocks]
    return sorted(plans, key=lambda plan: (costs.plan_cost(plan), plan))


def _origin(plan: Plan, move: Plan) -> str:
    (back,), (gone,) = {*plan} - {*move}, {*move} - {*plan}
    return f"exchange, {gone} for {back}"


def _last_choice(tried: _Tried, leading: Sequence[Plan], count: int, ahead: Ahead) -> Plan:
    """Read the finalists on the second window and choose the lowest loss over both windows.

    Args:
        tried: the plans evaluated so far.
        leading: plans that are finalists in any case: the best one and the start of the search.
        count: number of finalists; the others are those of lowest loss on the first window.
        ahead: see `exchange_search`.
    """
    others = sorted((plan for plan in tried.losses if plan not in leading), key=tried.nll)
    finalists = [*dict.fromkeys(leading), *others][:count]
    finite = []
    for place, plan in enumerate(finalists):
        ahead(finalists[place:], 1)
        finite += [plan] if tried.read(plan, 1) else []
    if not (finite or tried.losses):
        raise SimdiffError("exchange_search: the loss of every plan is NaN or Inf in some window")
    return min(finite or tried.losses, key=tried.nll)


@dataclass
class _Tried:
    """The plans evaluated so far, with their losses."""

    evaluate: TokenLosses
    origins: dict[Plan, str] = field(default_factory=dict)
    losses: dict[Plan, list[Tensor]] = field(default_factory=dict)
    """Losses of all tokens for each plan and window; excluded plans are not in it."""
    reads: int = 0

    def read(self, plan: Plan, window: int, origin: str = "") -> bool:
        """Evaluate a plan on one more window; return whether its losses are finite."""
        self.origins.setdefault(plan, origin)
        self.reads += 1
        losses = self.evaluate(plan, window)
        if losses is None or not bool(losses.isfinite().all()):
            self.losses.pop(plan, None)
            return False
        self.losses.setdefault(plan, []).append(losses.double().cpu())
        return True

    def nll(self, plan: Plan) -> float:
        """Mean loss of a plan over all windows it has read, in nats per token."""
        return float(torch.cat(self.losses[plan]).mean())

    def better(self, plan: Plan, than: Plan) -> bool:
        """Whether the loss on the first window is lower by more than one standard error."""
        gain = self.losses[than][0] - self.losses[plan][0]
        return float(gain.mean()) > standard_error(gain)

    def candidates(self) -> list[Candidate]:
        """All plans in the order in which they were tried."""
        return [
            Candidate(plan, origin, self.nll(plan), len(self.losses[plan]))
            if plan in self.losses
            else Candidate(plan, origin)
            for plan, origin in self.origins.items()
        ]
