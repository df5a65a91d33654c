"""Exchange search: from the best plan of a shortlist, one layer back for another, a few times.

The costs of blocks say which exchanges are promising; a few short evaluations say which of them
help. All plans read the same window of calibration text, and an exchange is taken where it lowers
the loss by more than one standard error of the paired difference over tokens, which varies far
less than either loss. At the end the best plans read another window, so that none wins by the luck
of one. The search starts from the layers of lowest block influence unless another plan of the
shortlist is better by two standard errors, so that it does not end behind them by chance.

Measured on held-out text (8 windows of 256 tokens; windows of 512 to search, on the same text as
greedy search with four of them), perplexity of the shortlist's best by one window, after exchanges,
and of greedy search, all for SmolLM2-135M with 30 layers (`benchmarks/plan_quality.py`, calibrated
on 16 windows):

    layers      2     3     4     5     6     7     8     9    10    11     12
    shortlist  27.0  29.6  34.5  37.2  44.5  48.1  58.1  82.8  93.1 106.9 133.8
    exchanges  25.8  27.7  34.2  37.2  41.7  48.1  57.6  68.3  93.3 103.8 124.8
    greedy     26.6  29.6  32.4  38.5  43.9  48.1  57.6  68.3  89.1 109.9 136.4
    reads         4     6     9    11    13    15    16    18    20    22    23

and for Gemma 3 270M with 18 layers (its greedy search from the third layer on with one window):

    layers           3      4      5      6
    shortlist     60.3   92.8  119.7  286.4
    exchanges     58.9   92.8  119.7  200.7
    greedy        55.9   78.4  127.5
    block infl.  166.6  239.6  299.6   8994
    reads            4      5      6      7

It loses where costs mislead: Gemma's layer 7, which greedy search takes second, is dear by its
cost, and no exchange for it was tried, not even in 24 reads. Removed alone on two windows of 256
tokens, layers 14, 9, 8 and 7 of Gemma raise the loss least, in this order; by cost layer 7 is the
fifth dearest of all, by the cosine distance the fourth.

What was tried in its place on SmolLM2 and not kept, within the same tokens read (costs from 2048
tokens):

    layers                          2     3     4     6     9    10     12
    reads of 128 tokens           26.6  29.6  34.5  43.9  68.3  86.5  139.7
    the same, each layer in turn  27.8  29.6  34.5  43.9  68.3  86.5  139.7
    reads of 256 tokens           26.8         34.5                   139.7
    as it is                      25.8  27.7  34.2  41.7  68.3  89.1  124.8

Short reads were of four (two) texts, and an exchange read on while it was ahead. Three times as
many exchanges are tried, but one that gains 0.05 nats is behind after its first read of 128 tokens
one time in four (standard error 0.08; gains are 0.02 to 0.1). Bringing every layer out once before
any a second time found nothing more. Ridge regression of the losses read on the layers removed
orders plans worse than the losses themselves at four of five numbers of layers. The divergence from
the dense model instead of the loss tells plans apart little better (a median of 4.9 standard errors
against 4.3) for the price of the dense logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.block_selection import BlockCosts, blocks_of
from simdiff.bypass import BypassEvaluator
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
    reference: Plan | None = None,
) -> tuple[Candidate, list[Candidate]]:
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
        reference: of the candidates the one to start from, unless the best of the others is better
            by more than two standard errors: the best of several is so by one too easily.

    Returns:
        The best plan and all plans tried, in their order, each with its `nll`.

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
    if reference in tried.losses and not tried.better(best, reference, errors=2):
        start = best = reference
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
    return next(candidate for candidate in evaluated if candidate.removed == best), evaluated


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

    def better(self, plan: Plan, than: Plan, errors: float = 1) -> bool:
        """Whether the first window's loss is lower by more than so many standard errors."""
        gain = self.losses[than][0] - self.losses[plan][0]
        return float(gain.mean()) > errors * float(gain.std()) / math.sqrt(gain.numel())

    def candidates(self) -> list[Candidate]:
        """In the order in which they were tried."""
        return [
            Candidate(plan, origin, self.nll(plan), len(self.losses[plan]))
            if plan in self.losses
            else Candidate(plan, origin)
            for plan, origin in self.origins.items()
        ]
