"""The search of `--effort normal` and `thorough`.

Layers are removed one after another, each step reads only the few candidates that earlier steps
promise, and single layers are exchanged at the end.

Reads are spent by races: all candidates read one window, those that are clearly worse or in the
worse part read no more, and the others read further windows. docs/method.md has the formulas.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.planning.batches import Ask, Plan
from simdiff.planning.choice import standard_error
from simdiff.planning.cost import Prices
from simdiff.planning.names import Effort
from simdiff.planning.readings import TOKENS_OF_TRUST, Readings
from simdiff.planning.shortlist import Candidate

# A plan is clearly worse where it is by so many standard errors of the paired difference.
CLEARLY = 2.5
# On fewer windows no plan is: one window is of a few documents, and others differ by more.
FEWEST_WINDOWS = 2
# Share of a race's plans that go on to the next round of windows; more of the last race's.
GO_ON, GO_ON_AT_LAST = 1 / 3, 1 / 2
# Windows that have been read by the end of each round.
ROUNDS = (1, 2, 4, 8, 16)
# Shares of the budget that each part may spend; the last choice has what all leave. It must have a
# fifth at least: two windows tell plans apart whose losses differ by some 0.07, eight by half that.
WALK, SINGLES, STEPS, EXCHANGES = 0.15, 0.3, 0.25, 0.1
# Most that the loss that a layer adds may grow or shrink in a step, where it is not measured anew.
MOST_GROWTH = 2.0


@dataclass
class _Node:
    """A plan of the beam and what each further layer is expected to add to its loss."""

    plan: Plan
    adds: dict[int, float]


class EffortSearch(Readings):
    """Finds the layers of least loss within a budget of reads; deterministic.

    Args:
        ask: evaluates plans; the plan () is the dense model. None in place of a plan's runs, or NaN
            or Inf among them, excludes it, as where the model cannot express the cut.
        prices: what a read costs.
        effort: how wide it searches.
        budget: in layers on a window.
        num_windows: number of windows that may be read.
        tokens: number of tokens that the head reads of a window.
        cost_of: the cost of a plan by scores, which knows how layers of a block go together; None
            leaves it out.
        protect: layers that stay.
        max_blocks: upper limit of the number of separate blocks.
    """

    def __init__(
        self,
        ask: Ask,
        prices: Prices,
        effort: Effort,
        *,
        budget: float,
        num_windows: int,
        tokens: int = TOKENS_OF_TRUST,
        cost_of: Callable[[Plan], float] | None = None,
        protect: Collection[int] = (),
        max_blocks: int | None = None,
    ) -> None:
        """Read nothing yet."""
        super().__init__(ask, prices, budget, tokens)
        self._effort, self._protect = effort, protect
        self._max_blocks, self._cost_of = max_blocks, cost_of
        most = min(num_windows, effort.windows)
        self._rounds = [end for end in ROUNDS if end < most] + [most]
        self._finalists: list[Plan] = []
        self.origins: dict[Plan, str] = {}

    def run(self, num_remove: int, first: Sequence[int], starts: Sequence[Candidate]) -> Candidate:
        """Search, and return the best plan.

        Args:
            num_remove: number of layers to remove.
            first: all layers that may go, the most promising by scores first.
            starts: plans of scores, of this number of layers.

        Raises:
            SimdiffError: no plan has a finite loss.
        """
        for start in starts:
            self.origins.setdefault(start.removed, start.origin)
        free = [layer for layer in first if layer not in self._protect]
        whole = self.spent.left
        near = self._walk([start.removed for start in starts], free, whole * WALK)
        nodes = self._singles(free, whole * SINGLES)
        steps = whole * STEPS if num_remove > 1 else 0.0
        for size in range(2, num_remove + 1):
            allowance = steps / (num_remove + 1 - size)
            before = self.spent.left
            nodes = self._step(nodes, free, allowance) or nodes
            steps -= before - self.spent.left
        found = [node.plan for node in nodes if len(node.plan) == num_remove]
        best = self._race([*found, *near, *(s.removed for s in starts)], 1, self.spent.left / 4)
        if not best:
            raise SimdiffError(
                "the loss must be finite for some plan, got NaN, Inf or a cut that the model "
                f"cannot express for all {len(self.origins)} that were tried"
            )
        adds = next((n.adds for n in nodes if n.plan == best[0]), nodes[0].adds if nodes else {})
        chosen = self._exchanges(_Node(best[0], dict(adds)), free, whole * EXCHANGES)
        finalists = sorted(
            (plan for plan in self._found if len(plan) == num_remove), key=self._mean_key
        )
        finalists = [chosen, *(plan for plan in finalists if plan != chosen)]
        self._finalists = finalists[: self._effort.finalists]
        last = self._race(self._finalists, 1, self.spent.left, last=True)
        return self._candidate((last or [chosen])[0])

    def gains(self, best: Plan) -> list[dict[int, Tensor]]:
        """What the others of the last choice would add to the loss, in runs of each window read."""
        others = [plan for plan in self._finalists if plan != best and plan in self._found]
        found = (self._differences(plan, best) for plan in others if best in self._found)
        return [differences for differences in found if differences]

    def candidates(self, num_remove: int) -> list[Candidate]:
        """All plans of this number of layers that were tried, in order."""
        return [self._candidate(plan) for plan in self.origins if len(plan) == num_remove]

    def _candidate(self, plan: Plan) -> Candidate:
        origin, found = self.origins[plan], self._found.get(plan)
        if not found:
            return Candidate(plan, origin)
        return Candidate(plan, origin, self._mean(plan), len(found))

    def _walk(self, starts: Sequence[Plan], free: Sequence[int], allowance: float) -> list[Plan]:
        """From the best plan of scores to cheap neighbours that are better, on one window.

        Of all plans that differ from the best one in one layer the cheapest by scores is read next;
        the walk goes on from it where it is better by more than a standard error.
        """
        cost_of = self._cost_of
        if cost_of is None or not starts:
            return []
        before = self.spent.left
        self._read(starts, [0])
        read = [plan for plan in starts if plan in self._found]
        best = min(read, key=self._mean_key, default=None)
        while best is not None:
            moves = {
                tuple(sorted({*best} - {back} | {gone})): (back, gone)
                for back in best
                for gone in free
                if gone not in best
            }
            new = [p for p in moves if p not in self.origins and self._allowed(p)]
            if not new:
                break
            move = min(new, key=lambda plan: (cost_of(plan), plan))
            if before - self.spent.left + self.spent.price([move], [0]) > allowance:
                break
            back, gone = moves[move]
            self.origins[move] = f"exchange, {gone} for {back}"
            self._read([move], [0])
            if move not in self._found:
                continue
            gain = self._mixed([self._found[best][0] - self._found[move][0]])
            if float(gain.mean()) > standard_error(gain):
                best = move
        return [] if best is None else [best]

    def _singles(self, free: Sequence[int], allowance: float) -> list[_Node]:
        """Remove each layer alone, as many as can be read."""
        plans = [(layer,) for layer in free]
        for plan in plans:
            self.origins.setdefault(plan, "one layer")
        best = self._race(plans, self._effort.beam, allowance)
        adds = {plan[0]: self._mean(plan) for plan in plans if plan in self._found}
        return [_Node(plan, adds) for plan in best[: self._effort.beam]]

    def _step(self, nodes: Sequence[_Node], free: Sequence[int], allowance: float) -> list[_Node]:
        """Remove one layer more from each plan of the beam; the best ones are the new beam."""
        expected: dict[Plan, float] = {}
        parents: dict[Plan, tuple[_Node, int]] = {}
        for node in nodes:
            base = self._mean(node.plan)
            for layer in free:
                plan = tuple(sorted({*node.plan, layer}))
                if layer in node.plan or layer not in node.adds or not self._allowed(plan):
                    continue
                loss = base + node.adds[layer]
                if loss < expected.get(plan, math.inf):
                    expected[plan], parents[plan] = loss, (node, layer)
        tried = self._promising(expected, self._effort.width + 2 * (len(nodes) - 1))
        for plan in tried:
            node, layer = parents[plan]
            self.origins.setdefault(plan, f"layer {layer}, step {len(node.plan) + 1} of a search")
        best = self._race(tried, self._effort.beam, allowance)[: self._effort.beam]
        for node in nodes:
            self._learn(node, [parents[p][1] for p in tried if p in self._found])
        return [_Node(plan, dict(parents[plan][0].adds)) for plan in best]

    def _promising(self, expected: Mapping[Plan, float], count: int) -> list[Plan]:
        """The plans of least expected loss and of least cost by turns."""
        by_loss = sorted(expected, key=lambda plan: (expected[plan], plan))
        if self._cost_of is None:
            return by_loss[:count]
        costs = {plan: self._cost_of(plan) for plan in by_loss}
        by_cost = sorted(by_loss, key=lambda plan: (costs[plan], plan))
        turns = itertools.chain.from_iterable(zip(by_loss, by_cost, strict=True))
        return list(dict.fromkeys(turns))[:count]

    def _learn(self, node: _Node, layers: Collection[int]) -> None:
        """Take what was measured in place of what was expected; expect of others as much growth."""
        growth = []
        for layer in layers:
            plan = tuple(sorted({*node.plan, layer}))
            if layer in node.plan or plan not in self._found:
                continue
            new = self._between(plan, node.plan)
            if node.adds[layer] > 0 and new > 0:
                growth.append(new / node.adds[layer])
            node.adds[layer] = new
        factor = statistics.median(growth) if growth else 1.0
        factor = min(max(factor, 1 / MOST_GROWTH), MOST_GROWTH)
        for layer in node.adds.keys() - {*layers}:
            node.adds[layer] *= factor if node.adds[layer] > 0 else 1.0

    def _exchanges(self, node: _Node, free: Sequence[int], allowance: float) -> Plan:
        """Exchange single layers while that lowers the loss and something is left for it."""
        allowance = allowance if self._effort.exchanges else -1.0
        size = len(node.plan)
        tried: set[Plan] = set()
        while allowance > 0:
            before = self.spent.left
            without = {}
            if size > 1:
                backs = [tuple(k for k in node.plan if k != back) for back in node.plan]
                if self.spent.price(self._new(backs, [0]), [0]) > allowance / 2:
                    break
                self._read(backs, [0])
                without = {
                    back: plan
                    for back, plan in zip(node.plan, backs, strict=True)
                    if plan in self._found
                }
            expected = {}
            for back in node.plan:
                gain = (
                    self._between(node.plan, without[back])
                    if back in without
                    else self._mean(node.plan)
                )
                for gone in free:
                    plan = tuple(sorted({*node.plan} - {back} | {gone}))
                    if gone in node.plan or gone not in node.adds or plan in tried:
                        continue
                    if self._allowed(plan) and plan not in self._excluded:
                        expected[plan] = node.adds[gone] - gain, back, gone
            moves = self._promising(
                {plan: loss for plan, (loss, _, _) in expected.items()}, self._effort.width
            )
            if not moves:
                break
            for plan in moves:
                _, back, gone = expected[plan]
                self.origins.setdefault(plan, f"exchange, {gone} for {back}")
            allowance -= before - self.spent.left
            before = self.spent.left
            best = self._race([node.plan, *moves], 1, allowance / 2)
            allowance -= before - self.spent.left
            tried.update(moves)
            for plan in moves:
                _, back, gone = expected[plan]
                if plan in self._found and back in without:
                    node.adds[gone] = self._between(plan, without[back])
            if best and best[0] != node.plan:
                (back,), (gone,) = {*node.plan} - {*best[0]}, {*best[0]} - {*node.plan}
                if back in without:
                    node.adds[back] = self._between(node.plan, without[back])
                node = _Node(best[0], node.adds)
        return node.plan

    def _race(
        self, plans: Sequence[Plan], keep: int, allowance: float, *, last: bool = False
    ) -> list[Plan]:
        """Read plans window by window until `keep` are left or the allowance is spent.

        Any race but the last reads the few windows of its effort: what it chooses is not final. The
        last one begins with these and reads as many as it may.

        Returns:
            The plans that were left, of which all have read the same windows, the best first.
        """
        alive = [plan for plan in dict.fromkeys(plans) if plan not in self._excluded]
        done = 0
        early = min(self._effort.early, self._rounds[-1])
        for end in self._rounds:
            if end < early if last else end > early:
                continue
            windows = range(done, end)
            if done == 0:
                least = 1 if last else max(keep + 1, 2)
                alive = self._affordable(alive, windows, least, allowance)
                if last and self.spent.price(self._new(alive, windows), windows) > allowance:
                    break
            elif (
                len(alive) <= keep
                or self.spent.price(self._new(alive, windows), windows) > allowance
            ):
                break
            allowance -= self._read(alive, windows)
            alive = [plan for plan in alive if plan not in self._excluded]
            alive.sort(key=lambda plan: (self._mean(plan, end), plan))
            alive = self._left(alive, keep, end, GO_ON_AT_LAST if last else GO_ON)
            done = end
        return alive

    def _affordable(
        self, plans: list[Plan], windows: Collection[int], least: int, allowance: float
    ) -> list[Plan]:
        """The first of the plans, as many as can be read, of those not yet known at least some."""
        while (
            len(plans) > least and self.spent.price(self._new(plans, windows), windows) > allowance
        ):
            plans = plans[:-1]
        return plans

    def _left(self, ordered: list[Plan], keep: int, end: int, share: float) -> list[Plan]:
        """Those that stay in a race: not clearly worse than the last one kept, and not too many."""
        if len(ordered) <= keep:
            return ordered
        bar = ordered[keep - 1]
        most = max(keep, math.ceil(len(ordered) * share), 2)
        return [
            plan
            for place, plan in enumerate(ordered[:most])
            if place < keep or not self._clearly_worse(plan, bar, end)
        ]

    def _clearly_worse(self, plan: Plan, than: Plan, end: int) -> bool:
        gain = self._mixed([self._found[plan][w] - self._found[than][w] for w in range(end)])
        if end < FEWEST_WINDOWS or len(gain) < 2:
            return False
        return float(gain.mean()) > CLEARLY * float(gain.std()) / math.sqrt(len(gain))

    def _allowed(self, plan: Plan) -> bool:
        return self._max_blocks is None or len(layer_runs(plan)) <= self._max_blocks
