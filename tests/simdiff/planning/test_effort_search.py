"""The search of an effort against synthetic losses with a known optimum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.planning.cost import Prices
from simdiff.planning.effort_search import EffortSearch
from simdiff.planning.names import EFFORTS
from simdiff.planning.shortlist import Candidate

LAYERS = 12
ALONE = (9.0, 3.0, 0.5, 0.65, 0.1, 0.2, 4.0, 0.3, 0.05, 0.6, 1.0, 8.0)
TOGETHER = {(4, 8): 1.5, (5, 7): -0.3, (2, 3): -0.9, (8, 9): 0.2}
"""What two removed layers add beyond their sum: 2 and 3 go well together, 4 and 8 do not."""
Plan = tuple[int, ...]


def loss(plan: Plan) -> float:
    pairs = (TOGETHER.get(pair, 0.0) for pair in itertools.combinations(sorted(plan), 2))
    return math.fsum(ALONE[k] for k in plan) + math.fsum(pairs)


class Losses:
    """The true loss, a spread that differs between windows, and noise of every plan's own.

    The divergence is the rise of the loss with a tenth of the noise, without a part of what two
    layers add together.
    """

    def __init__(self, noise: float = 0.0, bad: tuple[Plan, ...] = (), off: float = 0.0) -> None:
        self.noise, self.bad, self.off = noise, bad, off
        self.asked: list[tuple[list[Plan], list[int]]] = []

    def __call__(
        self, plans: Sequence[Plan], windows: Sequence[int]
    ) -> Mapping[tuple[Plan, int], Tensor | None]:
        if plans != [()]:
            self.asked.append((list(plans), list(windows)))
        return {(plan, w): self.runs(plan, w) for plan in plans for w in windows}

    def runs(self, plan: Plan, window: int) -> Tensor | None:
        if plan in self.bad:
            return None
        seed = hash((plan, window)) % 2**31
        own = self.noise * bool(plan) * torch.randn(16, generator=_generator(seed))
        off = self.off * (loss(plan) - math.fsum(ALONE[k] for k in plan))
        scale = 1 + window / 10
        return torch.stack([(loss(plan) - off) * scale + own / 10, loss(plan) * scale + own + 2])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best_of(count: int, allowed=lambda plan: True) -> Plan:
    return min(filter(allowed, itertools.combinations(range(LAYERS), count)), key=loss)


def search(
    losses: Losses, effort: str, count: int, budget: float = 1e9, **options
) -> tuple[Candidate, EffortSearch]:
    chosen = EFFORTS[effort]
    assert chosen is not None
    found = EffortSearch(
        losses, Prices(LAYERS, 2.0), chosen, budget=budget, num_windows=8, **options
    )
    protect = options.get("protect", ())
    free = [k for k in range(LAYERS) if k not in protect]
    starts = [Candidate(tuple(free[-count:]), "start")] if "max_blocks" not in options else []
    return found.run(count, range(LAYERS), starts), found


@pytest.mark.parametrize("effort", ["normal", "thorough"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_finds_the_optimum(effort: str, count: int) -> None:
    """Greedy search takes 8, then 5, and needs 2 and 3 at once to be better."""
    best, found = search(Losses(), effort, count)
    assert best.removed == best_of(count)
    assert best.nll is not None
    assert best.removed in [candidate.removed for candidate in found.candidates(count)]


@pytest.mark.parametrize("budget", [0, 40, 150, 400])
def test_spends_what_it_may(budget: float) -> None:
    losses = Losses(noise=0.3)
    best, found = search(losses, "normal", 4, budget)
    # What a step must read, however little is left: two plans on a window, and two at the end.
    least = found.spent.prices.total(found.spent.prices.dense) + 6 * 2 * (LAYERS + 2)
    spent = found.spent.prices.total(found.spent.cost)
    assert spent <= max(budget, least)
    assert spent == budget - found.spent.left
    dense = len({w for _, windows in losses.asked for w in windows})
    reads = sum(len(plans) * len(windows) for plans, windows in losses.asked)
    assert found.spent.reads == reads + dense
    assert best.removed == search(Losses(noise=0.3), "normal", 4, budget)[0].removed


def test_more_windows_where_noise_decides() -> None:
    alone, noisy = Losses(), Losses(noise=2.0)
    search(alone, "thorough", 3)
    search(noisy, "thorough", 3)
    windows = [max(w for _, read in losses.asked for w in read) for losses in (alone, noisy)]
    assert windows[0] < windows[1] == 7


def test_what_may_not_go_and_what_cannot_be_read() -> None:
    best, found = search(Losses(), "normal", 3, protect=(8, 2))
    assert best.removed == best_of(3, lambda plan: not {8, 2} & {*plan})
    assert all(not {8, 2} & {*c.removed} for c in found.candidates(3))
    best, found = search(Losses(), "thorough", 4, max_blocks=2)
    assert len(layer_runs(best.removed)) <= 2
    assert all(len(layer_runs(c.removed)) <= 2 for c in found.candidates(4))
    wanted = best_of(3)
    best, found = search(Losses(bad=(wanted, (5,))), "thorough", 3)
    assert best.removed == best_of(3, lambda plan: plan != wanted and 5 not in plan)
    with pytest.raises(SimdiffError, match="finite for some plan, got NaN, Inf or a cut"):
        search(Losses(bad=tuple(itertools.combinations(range(LAYERS), 2))), "normal", 2)


def test_the_loss_counts_the_more_the_more_of_it_is_read() -> None:
    """The divergence is off; the loss of many tokens tells, that of a few does not."""
    off = 1.0  # without what 2 and 3 add together, 4, 5 and 8 are the best three
    of_divergence = min(
        itertools.combinations(range(LAYERS), 3), key=lambda plan: sum(ALONE[k] for k in plan)
    )
    assert of_divergence != best_of(3)
    found = [search(Losses(off=off), "thorough", 3, tokens=n)[0].removed for n in (1, 10**6)]
    assert found == [of_divergence, best_of(3)]


def test_the_costs_propose_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 and 11 go well together, which the costs know; alone, 11 goes last but one."""
    monkeypatch.setitem(TOGETHER, (5, 11), -9.0)
    chosen = EFFORTS["normal"]
    assert chosen is not None
    monkeypatch.setitem(EFFORTS, "normal", replace(chosen, exchanges=False))
    found = [search(Losses(), "normal", 3, cost_of=cost)[0].removed for cost in (None, loss)]
    assert 11 not in found[0]
    assert {5, 11} <= {*found[1]}
    assert loss(found[1]) < loss(found[0])


def test_walks_from_the_plan_of_scores_where_little_may_be_read() -> None:
    """Each read exchanges a layer of the start, 9, 10 and 11, for the one that costs least."""
    losses = Losses()
    best, found = search(losses, "normal", 3, 300, cost_of=loss)
    assert losses.asked[0] == ([(9, 10, 11)], [0])
    walked = [plans for plans, _ in losses.asked[1:4]]
    assert [len(plans) for plans in walked] == [1, 1, 1]
    values = [loss(plans[0]) for plans in walked]
    assert values == sorted(values, reverse=True)
    assert values[0] < loss((9, 10, 11))
    assert found.origins[walked[0][0]].startswith("exchange, ")
    assert loss(best.removed) <= values[-1]
