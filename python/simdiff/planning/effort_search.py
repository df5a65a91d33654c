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

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.planning.batches import Ask, Plan
from simdiff.planning.cost import Prices, Spent
from simdiff.planning.names import Effort
from simdiff.planning.shortlist import Candidate

# The divergence is off the rise of the loss by as much as the loss of so many tokens is uncertain:
# on the development texts, 1000 for SmolLM2-135M and 600 for Gemma 3 270M.
TOKENS_OF_TRUST = 1024
# A plan is clearly worse where it is by so many standard errors of the paired difference.
CLEARLY = 2.5
# On fewer windows no plan is: one window is of a few documents, and others differ by more.
FEWEST_WINDOWS = 2
# Share of a race's plans that go on to the next round of windows.
GO_ON = 1 / 3
# Windows that have been read by the end of each round.
ROUNDS = (1, 2, 4, 8, 16)
# Shares of the budget that single removals, the steps after them and the exchanges may spend; what
# one leaves the next one has, and the last choice what all leave.
SINGLES, STEPS, EXCHANGES = 0.45, 0.35, 0.5
# Most that the loss that a layer adds may grow or shrink in a step, where it is not measured anew.
MOST_GROWTH = 2.0


@dataclass
class _Node:
    """A plan of the beam and what each further layer is expected to add to its loss."""

    plan: Plan
    adds: dict[int, float]


class EffortSearch:
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
        self.spent = Spent(prices, budget)
        self._ask, self._effort, self._protect = ask, effort, protect
        self._max_blocks, self._tokens, self._cost_of = max_blocks, tokens, cost_of
        most = min(num_windows, effort.windows)
        self._rounds = [end for end in ROUNDS if end < most] + [most]
        self._dense: dict[int, Tensor] = {}
        self._found: dict[Plan, dict[int, Tensor]] = {}
        self._excluded: set[Plan] = set()
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
        nodes = self._singles(free, self.spent.left * SINGLES)
        steps = self.spent.left * STEPS if num_remove > 1 else 0.0
        for size in range(2, num_remove + 1):
            allowance = steps / (num_remove + 1 - size)
            before = self.spent.left
            nodes = self._step(nodes, free, allowance) or nodes
            steps -= before - self.spent.left
        found = [node.plan for node in nodes if len(node.plan) == num_remove]
        best = self._race([*found, *(s.removed for s in starts)], 1, self.spent.left / 4)
        if not best:
            raise SimdiffError(
                "the loss must be finite for some plan, got NaN, Inf or a cut that the model "
                f"cannot express for all {len(self.origins)} that were tried"
            )
        adds = next((n.adds for n in nodes if n.plan == best[0]), nodes[0].adds if nodes else {})
        chosen = self._exchanges(_Node(best[0], dict(adds)), free)
        finalists = sorted(
            (plan for plan in self._found if len(plan) == num_remove), key=self._mean_key
        )
        finalists = [chosen, *(plan for plan in finalists if plan != chosen)]
        self._finalists = finalists[: self._effort.finalists]
        last = self._race(self._finalists, 1, self.spent.left, last=True)
        return self._candidate((last or [chosen])[0])

    def gains(self, best: Plan) -> list[dict[int, Tensor]]:
        """What the others of the last choice would add to the loss, in runs of each window read."""
        ours, gains = self._found.get(best, {}), []
        for plan in self._finalists:
            theirs = self._found.get(plan, {})
            differences = {w: theirs[w] - ours[w] for w in ours if w in theirs}
            if plan != best and differences:
                sizes = [runs.shape[-1] for runs in differences.values()]
                mixed = self._mixed([*differences.values()]).split(sizes)
                gains.append(dict(zip(differences, mixed, strict=True)))
        return gains

    def candidates(self, num_remove: int) -> list[Candidate]:
        """All plans of this number of layers that were tried, in order."""
        return [self._candidate(plan) for plan in self.origins if len(plan) == num_remove]

    def _candidate(self, plan: Plan) -> Candidate:
        origin, found = self.origins[plan], self._found.get(plan)
        if not found:
            return Candidate(plan, origin)
        return Candidate(plan, origin, self._mean(plan), len(found))

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

    def _exchanges(self, node: _Node, free: Sequence[int]) -> Plan:
        """Exchange single layers while that lowers the loss and something is left for it."""
        allowance = self.spent.left * EXCHANGES if self._effort.exchanges else -1.0
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
            alive = self._left(alive, keep, end)
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

    def _new(self, plans: Sequence[Plan], windows: Collection[int]) -> list[Plan]:
        return [plan for plan in plans if any(w not in self._found.get(plan, {}) for w in windows)]

    def _left(self, ordered: list[Plan], keep: int, end: int) -> list[Plan]:
        """Those that stay in a race: not clearly worse than the last one kept, and not too many."""
        if len(ordered) <= keep:
            return ordered
        bar = ordered[keep - 1]
        most = max(keep, math.ceil(len(ordered) * GO_ON), 2)
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

    def _allowed(self, plan: Plan) -> bool:
        return self._max_blocks is None or len(layer_runs(plan)) <= self._max_blocks
