"""Exchange search: from the better of two plans, one layer back for another, a few times.

The costs of blocks say which exchanges are promising; a few short evaluations say which of them
help. All plans read the same window of calibration text, and an exchange is taken where it lowers
the loss by more than one standard error of the paired difference over tokens, which varies far
less than either loss. At the end the best plans read another window, and the lowest loss over both
windows decides, so that none wins by the luck of one.

What the exchanges bring was judged on the development texts (SmolLM2-135M, Gemma 3 270M and
Qwen2.5-Coder-0.5B, two kinds of text, 10% and 25% of the layers): without them the plan is the same
in ten cases of twelve, its perplexity is 8% higher in one and 2% higher, within the error, in one
(`benchmarks/results/development-*.json`). A rule that left block influence only for a gain of two
standard errors, and layers kept since they write a massive activation, changed no plan in any of
the twelve, and are gone.

It loses where costs mislead: removed alone, Gemma's layer 7 raises the loss little and is dear by
its cost, and no exchange for it is tried. What was tried in its place and not kept, on SmolLM2
alone and on windows that are not reported on: reads of 128 and 256 tokens, of more plans (one that
gains 0.05 nats is behind after 128 tokens one time in four); bringing every layer out once before
any a second time; ridge regression of the losses read on the layers removed; the divergence from
the dense model instead of the loss, which tells plans apart little better for the price of the
dense logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.block_selection import BlockCosts, blocks_of
from simdiff.bypass import BypassEvaluator
from simdiff.choice import choice_agreement, standard_error
from simdiff.errors import SimdiffError
from simdiff.shortlist import Candidate
from simdiff.surgery import SurgeryError, removed_layers

Plan = tuple[int, ...]
TokenLosses = Callable[[Plan, int], Tensor | None]
"""From a plan and the number of a window to the loss of each token, one dimension; None where the
plan is out, since some loss is NaN or Inf or the model cannot express the cut."""

# Of greedy search to the same number of layers, in windows read.
SEARCH_FRACTION = 1 / 50
# For each window of greedy search at most so many reads: deep models get no more than was measured.
MAX_READS = 6
# So many plans read the second window, where the budget has room for it four times over.
FINALISTS = 3


def affordable_reads(num_layers: int, num_remove: int, search_windows: int) -> int:
    """How many plans may read one window each, for `SEARCH_FRACTION` of greedy search.

    Greedy search by perplexity (SLEB, arXiv 2402.09025) evaluates L - k plans to remove layer
    k + 1, for k = 0 ... K - 1, hence L K - K (K - 1) / 2, each on all its windows. What it reads
    has more layers than a finished plan, so that in layers times tokens the fraction is smaller:
    1/54 to 1/68 for 2 to 12 of 30 layers, the calibration pass apart.

    Args:
        num_layers: L.
        num_remove: K.
        search_windows: that greedy search would read, of the same length.
    """
    evaluations = num_layers * num_remove - num_remove * (num_remove - 1) // 2
    return min(int(evaluations * search_windows * SEARCH_FRACTION), MAX_READS * search_windows)


def losses_of_cuts(model: PreTrainedModel, windows: Tensor) -> TokenLosses:
    """The losses of the model without a plan's layers, reusing what enters the first of them.

    Args:
        model: the dense model; unchanged between and after evaluations.
        windows: token ids `(num_windows, window_length)` of calibration text, never held-out text.
    """
    evaluator = BypassEvaluator(model, windows)

    def losses(plan: Plan, window: int) -> Tensor | None:
        try:
            with removed_layers(model, plan):  # stock classes can express the cut
                pass
        except SurgeryError:
            return None
        return evaluator.token_losses(plan, window)

    return losses


def exchange_search(
    losses: TokenLosses,
    candidates: Sequence[Candidate],
    costs: BlockCosts,
    *,
    max_reads: int,
    num_windows: int = 2,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
) -> tuple[Candidate, list[Candidate], float]:
    """Improve the best candidate by exchanges, within a number of windows read in all.

    Of all plans that differ from the best one in one layer, the cheapest that was not tried yet
    comes next; where it is better, the search goes on from there. Deterministic.

    Args:
        losses: of a plan on a window.
        candidates: where to start; all are evaluated, even beyond `max_reads`.
        costs: of blocks, raised to the power in which they add up.
        max_reads: how many times `losses` may be called.
        num_windows: that `losses` knows; the search reads the first, the last choice the second.
        protect: layers that stay.
        max_blocks: at most so many separate blocks.

    Returns:
        The best plan; all plans tried, in their order, each with its `nll`; and how sure the choice
        among them is (`simdiff.choice.choice_agreement`).

    Raises:
        SimdiffError: no candidates, or no candidate has a finite loss.
    """
    if not candidates:
        raise SimdiffError("exchange_search: candidates must hold at least one plan, got none")
    tried = _Tried(losses)
    for candidate in candidates:
        tried.read(candidate.removed, 0, candidate.origin)
    if not tried.losses:
        raise SimdiffError(
            f"exchange_search: the loss must be finite for some candidate, got NaN, Inf or a cut "
            f"that the model cannot express for all {len(candidates)}"
        )
    start = best = min(tried.losses, key=tried.nll)
    final = FINALISTS if num_windows > 1 and max_reads >= 4 * FINALISTS else 0
    moves = _exchanges(best, costs, protect, max_blocks)
    while tried.reads < max_reads - final:
        move = next((move for move in moves if move not in tried.origins), None)
        if move is None:
            break
        if tried.read(move, 0, _origin(best, move)) and tried.better(move, best):
            best = move
            moves = _exchanges(best, costs, protect, max_blocks)
    if final:
        best = _last_choice(tried, [best, start], final)
    evaluated = tried.candidates()
    chosen = next(candidate for candidate in evaluated if candidate.removed == best)
    in_order = {plan: tried.losses[plan] for plan in tried.origins if plan in tried.losses}
    first = {tuple(sorted(candidate.removed)) for candidate in candidates}
    return chosen, evaluated, choice_agreement(in_order, first, best)


def _exchanges(
    plan: Plan, costs: BlockCosts, protect: Collection[int], max_blocks: int | None
) -> list[Plan]:
    """All plans that differ in one layer, the cheapest first."""
    outside = [k for k in range(costs.num_layers) if k not in plan and k not in protect]
    plans = [tuple(sorted({*plan} - {back} | {gone})) for back in plan for gone in outside]
    if max_blocks is not None:
        plans = [plan for plan in plans if len(blocks_of(plan)) <= max_blocks]
    return sorted(plans, key=lambda plan: (costs.of(plan), plan))


def _origin(plan: Plan, move: Plan) -> str:
    (back,), (gone,) = {*plan} - {*move}, {*move} - {*plan}
    return f"exchange, {gone} for {back}"


def _last_choice(tried: _Tried, ahead: Sequence[Plan], count: int) -> Plan:
    """The lowest loss over both windows among the plans ahead and those next to them on the first.

    Args:
        tried: so far.
        ahead: the best plan and the one that the search started from.
        count: of finalists.
    """
    others = sorted((plan for plan in tried.losses if plan not in ahead), key=tried.nll)
    finalists = [*dict.fromkeys(ahead), *others][:count]
    finite = [plan for plan in finalists if tried.read(plan, 1)]
    if not (finite or tried.losses):
        raise SimdiffError("exchange_search: the loss of every plan is NaN or Inf in some window")
    return min(finite or tried.losses, key=tried.nll)


@dataclass
class _Tried:
    """Plans evaluated so far."""

    of: TokenLosses
    origins: dict[Plan, str] = field(default_factory=dict)
    losses: dict[Plan, list[Tensor]] = field(default_factory=dict)
    """By window; plans that are out have none."""
    reads: int = 0

    def read(self, plan: Plan, window: int, origin: str = "") -> bool:
        """Evaluate a plan on one more window; whether its loss is finite."""
        self.origins.setdefault(plan, origin)
        self.reads += 1
        losses = self.of(plan, window)
        if losses is None or not bool(losses.isfinite().all()):
            self.losses.pop(plan, None)
            return False
        self.losses.setdefault(plan, []).append(losses.double().cpu())
        return True

    def nll(self, plan: Plan) -> float:
        """In nats per token, over all windows the plan has read."""
        return float(torch.cat(self.losses[plan]).mean())

    def better(self, plan: Plan, than: Plan) -> bool:
        """Whether the first window's loss is lower by more than a standard error."""
        gain = self.losses[than][0] - self.losses[plan][0]
        return float(gain.mean()) > standard_error(gain)

    def candidates(self) -> list[Candidate]:
        """In the order in which they were tried."""
        return [
            Candidate(plan, origin, self.nll(plan), len(self.losses[plan]))
            if plan in self.losses
            else Candidate(plan, origin)
            for plan, origin in self.origins.items()
        ]
