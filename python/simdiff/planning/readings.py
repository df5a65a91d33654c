"""Readings: what a search has read of plans, and what it makes of that."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.planning.batches import Ask, Plan
from simdiff.planning.cost import Prices, Spent

# The divergence is off the rise of the loss by as much as the loss of so many tokens is uncertain:
# on the development texts, 1000 for SmolLM2-135M and 600 for Gemma 3 270M.
TOKENS_OF_TRUST = 1024


class Readings:
    """What plans add to the loss of the dense model, by window, and what reading them cost.

    Args:
        ask: evaluates plans; the plan () is the dense model. None in place of a plan's runs, or NaN
            or Inf among them, excludes it, as where the model cannot express the cut.
        prices: what a read costs.
        budget: in layers on a window.
        tokens: number of tokens that the head reads of a window.
    """

    def __init__(self, ask: Ask, prices: Prices, budget: float, tokens: int) -> None:
        """Read nothing yet."""
        self.spent = Spent(prices, budget)
        self._ask, self._tokens = ask, tokens
        self._dense: dict[int, Tensor] = {}
        self._found: dict[Plan, dict[int, Tensor]] = {}
        self._excluded: set[Plan] = set()

    def _new(self, plans: Sequence[Plan], windows: Collection[int]) -> list[Plan]:
        return [plan for plan in plans if any(w not in self._found.get(plan, {}) for w in windows)]

    def _read(self, plans: Sequence[Plan], windows: Sequence[int]) -> float:
        """Read what is not known of some plans and windows; return what it cost."""
        before = self.spent.left
        new = [w for w in windows if w not in self._dense]
        if new:
            dense = self._ask([()], new)
            for window in new:
                found = dense[(), window]
                if found is None or not bool(found.isfinite().all()):
                    raise SimdiffError("the loss of the dense model must be finite, got NaN or Inf")
                self._dense[window] = found.double()
        wanted = self._new(plans, windows)
        read = self._ask(wanted, windows) if wanted else {}
        self.spent.cost += self.spent.of(wanted, windows)
        self.spent.windows.update(windows)
        self.spent.reads += len(wanted) * len(windows) + len(new)
        for plan in wanted:
            for window in windows:
                losses = read[plan, window]
                if losses is None or not bool(losses.isfinite().all()):
                    self._excluded.add(plan)
                    self._found.pop(plan, None)
                    break
                difference = losses.double() - self._dense[window]
                self._found.setdefault(plan, {})[window] = difference
        return before - self.spent.left

    def _mean(self, plan: Plan, end: int | None = None) -> float:
        """What a plan adds to the loss of the dense model, over the first or all its windows."""
        if not plan:
            return 0.0
        found = self._found[plan]
        return float(self._mixed([found[w] for w in found if end is None or w < end]).mean())

    def _mean_key(self, plan: Plan) -> tuple[float, Plan]:
        return self._mean(plan), plan

    def _between(self, plan: Plan, base: Plan) -> float:
        """What a plan adds to the loss of another one, over the windows that both read."""
        found, other = self._found[plan], self._found[base]
        both = [window for window in found if window in other]
        return float(self._mixed([found[w] - other[w] for w in both]).mean())

    def _mixed(self, windows: Sequence[Tensor]) -> Tensor:
        """Divergence and rise of the loss in one, of the runs of some windows.

        Their weights are those of two measurements of the same thing: the loss is uncertain by what
        its tokens vary, the fewer the more; the divergence is off by something else.
        """
        divergence, loss = torch.cat(list(windows), -1)
        tokens = self._tokens * len(windows)
        share = tokens / (tokens + TOKENS_OF_TRUST)
        return (1 - share) * divergence + share * loss

    def _differences(self, plan: Plan, base: Plan) -> dict[int, Tensor]:
        """What a plan adds to the loss of another one, in runs of each window that both read."""
        theirs, ours = self._found[plan], self._found[base]
        both = {w: theirs[w] - ours[w] for w in ours if w in theirs}
        if not both:
            return {}
        sizes = [runs.shape[-1] for runs in both.values()]
        return dict(zip(both, self._mixed([*both.values()]).split(sizes), strict=True))
