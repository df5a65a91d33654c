"""Exchange search against synthetic losses with a known optimum, and on a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import token_losses
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.io import ranks
from simdiff.models.layer_indices import layer_runs
from simdiff.models.structure import find_decoder_layers
from simdiff.planning import exchange
from simdiff.planning.block_costs import block_costs
from simdiff.planning.blocks import BlockCosts, optimal_blocks
from simdiff.planning.budget import Budget
from simdiff.planning.criteria import importance
from simdiff.planning.exchange import CutLosses, affordable_reads, exchange_search
from simdiff.planning.make_plan import make_plan
from simdiff.planning.options import PlanOptions
from simdiff.planning.plan import PruningPlan
from simdiff.planning.shortlist import Candidate, shortlist
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import layers_removed
from support.processes import Processes
from support.tiny_models import make_tiny

LAYERS, TOKENS = 10, 400
TRUE = (9.0, 3.0, 0.5, 0.6, 0.1, 0.2, 4.0, 0.3, 0.05, 8.0)


# The costs know the order of layers but for two: 3 looks too cheap, 8 too dear.
SEEN = (9.0, 3.0, 0.5, 0.15, 0.1, 0.2, 4.0, 0.3, 0.6, 8.0)
START = Candidate((3, 4, 5), "start")


def additive(values: tuple[float, ...]) -> BlockCosts:
    """The cost of a block is the sum of its layers'."""
    rows = [
        tuple(math.fsum(values[start:stop]) if start < stop else 0.0 for stop in range(LAYERS + 1))
        for start in range(LAYERS + 1)
    ]
    return BlockCosts("additive", "sum", tuple(rows))


class Losses:
    """The true sum, a spread over tokens that all plans share, and one of mean 0 off the start."""

    def __init__(self, spread: float = 0.0, bad: tuple[int, ...] = ()) -> None:
        self.spread, self.bad = spread, bad
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, plan: tuple[int, ...], window: int) -> torch.Tensor:
        self.calls.append((plan, window))
        shared = torch.randn(TOKENS, generator=torch.Generator().manual_seed(window))
        own = self.spread * (-1.0) ** torch.arange(TOKENS) * (plan != START.removed)
        losses = 3 + shared + own + sum(TRUE[k] for k in plan)
        return losses * math.nan if any(k in plan for k in self.bad) else losses


def test_finds_the_optimum_that_costs_miss() -> None:
    losses = Losses()
    best, tried, _ = exchange_search(losses, [START], additive(SEEN), max_reads=24)
    wanted = min(
        itertools.combinations(range(LAYERS), 3), key=lambda plan: sum(TRUE[k] for k in plan)
    )
    assert wanted == (4, 5, 8)
    assert best.removed == wanted
    assert best.num_windows == 2
    both = torch.cat([Losses()(wanted, window) for window in (0, 1)]).double()
    assert best.nll == pytest.approx(both.mean().item(), rel=1e-6)
    assert len(losses.calls) == 24 == len(tried) + 3
    assert len({candidate.removed for candidate in tried}) == len(tried)
    assert next(c.origin for c in tried if c.removed == wanted).startswith("exchange, 8 for ")
    again = exchange_search(Losses(), [START], additive(SEEN), max_reads=24)
    assert again[:2] == (best, tried)


def test_reads_no_more_than_it_may() -> None:
    assert affordable_reads(30, 12, 4) == 294 * 4 // 50
    assert affordable_reads(30, 2, 4) == 4
    assert affordable_reads(80, 20, 4) == 24
    for max_reads in (1, 2, 5, 12, 13):
        for num_windows in (1, 2):
            losses = Losses()
            exchange_search(
                losses, [START], additive(SEEN), max_reads=max_reads, num_windows=num_windows
            )
            assert len(losses.calls) == max_reads
            assert {window for _, window in losses.calls} <= set(range(num_windows))
    losses = Losses()  # 10 choose 3 plans, less than the budget: none is read twice on a window
    exchange_search(losses, [START], additive(SEEN), max_reads=1000)
    assert len(losses.calls) == len(set(losses.calls)) < 123
    losses = Losses()  # all candidates are read, and nothing else
    pair = [START, Candidate((2, 4, 5), "other")]
    best, _, _ = exchange_search(losses, pair, additive(SEEN), max_reads=1)
    assert best.origin == "other"
    assert len(losses.calls) == 2


def test_a_gain_within_its_error_is_not_taken() -> None:
    """Layer 2 for 3 gains 0.1: two standard errors of 400 tokens at spread 1, half of one at 4."""
    pair = additive((9.0,) * 2 + (0.5, 0.55, 0.1, 0.2) + (9.0,) * 4)
    for spread, wanted in ((1.0, True), (4.0, False)):
        losses = Losses(spread)
        best, tried, _ = exchange_search(losses, [START], pair, max_reads=2, num_windows=1)
        assert [candidate.removed for candidate in tried] == [(3, 4, 5), (2, 4, 5)]
        assert (best.removed == (2, 4, 5)) is wanted


def test_plans_with_nan_are_out() -> None:
    best, tried, _ = exchange_search(Losses(bad=(8,)), [START], additive(SEEN), max_reads=24)
    assert best.removed == (4, 5, 7)
    assert {c.nll is None for c in tried if 8 in c.removed} == {True}
    assert all(c.nll is not None for c in tried if 8 not in c.removed)
    with pytest.raises(SimdiffError, match="express for all 1"):
        exchange_search(Losses(bad=(4,)), [START], additive(SEEN), max_reads=24)
    with pytest.raises(SimdiffError, match="at least one plan"):
        exchange_search(Losses(), [], additive(SEEN), max_reads=24)

    def second_window(plan: tuple[int, ...], window: int) -> torch.Tensor | None:
        return None if window and 8 in plan else Losses()(plan, window)

    best, _, _ = exchange_search(second_window, [START], additive(SEEN), max_reads=24)
    assert 8 not in best.removed


def test_protected_layers_and_blocks() -> None:
    _, tried, _ = exchange_search(
        Losses(), [START], additive(SEEN), max_reads=40, protect=(8, 2), max_blocks=1
    )
    assert all(not {8, 2} & {*candidate.removed} for candidate in tried)
    assert all(len(layer_runs(candidate.removed)) == 1 for candidate in tried)
    assert len(tried) == 2  # (3, 4, 5) and (4, 5, 6): an exchange moves a block by one


def test_cut_losses(llama: PreTrainedModel) -> None:
    windows = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(5))
    losses = CutLosses(llama, windows)((1, 4), 1)
    with layers_removed(llama, (1, 4)):
        wanted = perplexity(llama, windows[1:]).nll
    assert losses is not None
    assert losses.shape == (11,)
    assert losses.mean().item() == pytest.approx(wanted, rel=1e-6)
    assert token_losses(llama, windows[0]).mean().item() == pytest.approx(
        perplexity(llama, windows[:1]).nll, rel=1e-6
    )


class Reads:
    """In place of the losses of a model's cuts; keeps what was read."""

    def __init__(self, losses: Callable[[tuple[int, ...]], torch.Tensor]) -> None:
        self.losses = losses
        self.num_windows: int | None = None
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, plan: tuple[int, ...], window: int) -> torch.Tensor:
        self.calls.append((plan, window))
        return self.losses(plan)

    def ahead(self, plans: Sequence[tuple[int, ...]], window: int) -> None:
        """Nothing: this is a single process."""

    def of_cuts(self, model: PreTrainedModel, windows: torch.Tensor) -> Reads:
        self.num_windows = len(windows)
        return self


def planned(
    monkeypatch: pytest.MonkeyPatch, reads: Reads, scores: LayerScores, num_layers: int, **more: Any
) -> PruningPlan:
    """By the options of the command, with a model and 60 windows at hand, scores apart."""
    monkeypatch.setattr(exchange, "CutLosses", reads.of_cuts)
    options = PlanOptions(budget=Budget(num_layers=num_layers), bootstrap=0, effort="quick", **more)
    return options.plan(scores, make_tiny("llama"), torch.zeros(60, 12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("num_windows", "protect", "wanted"), [(20, (1,), 6), (27, (), 8), (30, (), 9), (40, (), 12)]
)
def test_a_plan_reads_a_fiftieth_of_greedy_search(
    llama_scores: LayerScores,
    monkeypatch: pytest.MonkeyPatch,
    num_windows: int,
    protect: tuple[int, ...],
    wanted: int,
) -> None:
    """To remove 3 of 6 layers greedy search reads 6 + 5 + 4 plans, each on all windows."""
    assert wanted == 15 * num_windows // 50
    reads = Reads(lambda plan: torch.full((4,), float(sum(plan))))
    plan = planned(
        monkeypatch, reads, llama_scores, 3, evaluation_windows=num_windows, protect=protect
    )
    assert reads.num_windows == num_windows
    assert len(reads.calls) == len({*reads.calls}) == wanted
    assert {window for _, window in reads.calls} == ({0} if wanted < 12 else {0, 1})
    assert all(not {*protect} & {*tried} for tried, _ in reads.calls)
    assert set(plan.removed) == ({0, 2, 3} if protect else {0, 1, 2})  # the least sum


def test_no_windows_no_reads(llama_scores: LayerScores, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(lambda plan: torch.ones(2))
    plan = planned(monkeypatch, reads, llama_scores, 3, evaluation_windows=0)
    assert reads.calls == []
    assert plan.candidates == ()


def test_choice_by_perplexity(llama: PreTrainedModel, llama_scores: LayerScores) -> None:
    windows = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(5))
    candidates = shortlist(llama_scores, 2)
    assert len({candidate.removed for candidate in candidates}) == len(candidates) <= 2
    assert candidates[0].removed == optimal_blocks(block_costs(llama_scores).raised(5 / 6), 2)
    influence = tuple(sorted(importance(llama_scores, "block-influence").ranking()[:2]))
    assert influence in [candidate.removed for candidate in candidates]
    assert all(3 not in c.removed for c in shortlist(llama_scores, 2, protect=(3,)))
    assert all(len(layer_runs(c.removed)) == 1 for c in shortlist(llama_scores, 2, max_blocks=1))

    candidates = [Candidate((0, 1), "a"), Candidate((2, 4), "b"), Candidate((4, 5), "c")]
    best, evaluated, _ = exchange_search(
        CutLosses(llama, windows), candidates, block_costs(llama_scores), max_reads=0
    )
    assert len(evaluated) == 3
    assert len(find_decoder_layers(llama)) == 6
    for candidate in evaluated:
        kept = [llama.model.layers[k] for k in range(6) if k not in candidate.removed]
        whole, llama.model.layers = llama.model.layers, nn.ModuleList(kept)
        llama.config.num_hidden_layers = 4
        with torch.no_grad():
            wanted = llama(input_ids=windows[:1], labels=windows[:1], use_cache=False).loss
        llama.model.layers, llama.config.num_hidden_layers = whole, 6
        assert candidate.nll == pytest.approx(wanted.item(), rel=1e-5)
    assert best.nll == min(candidate.nll for candidate in evaluated if candidate.nll is not None)


def test_a_candidate_with_nan_is_out_and_told(
    llama: PreTrainedModel, llama_scores: LayerScores
) -> None:
    windows = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0] = math.nan
    pair = [Candidate((4, 5), "with NaN"), Candidate((1, 5), "without")]
    losses, costs = CutLosses(llama, windows), block_costs(llama_scores)
    best, evaluated, _ = exchange_search(losses, pair, costs, max_reads=2)
    assert best.origin == "without"
    assert [candidate.nll is None for candidate in evaluated] == [True, False]
    with pytest.raises(SimdiffError, match="NaN, Inf or a cut"):
        exchange_search(losses, pair[:1], costs, max_reads=2)
    plan = make_plan(
        llama_scores,
        1,
        protect=(0, 2, 3, 4, 5),
        model=llama,
        windows=windows,
        effort="quick",
    )
    assert plan.removed == (1,)
    assert plan.candidates[0]["nll"] > 0
    assert "chosen among 1 plan by perplexity" in plan.notes[-1]


def test_processes_read_the_next_exchanges_together(
    llama: PreTrainedModel, llama_scores: LayerScores, tmp_path: Path, monkeypatch
) -> None:
    windows = torch.randint(0, 97, (40, 12), generator=torch.Generator().manual_seed(5))
    read, inner = list[Any](), exchange.CutLosses._read

    def counted(self: CutLosses, wanted: Any) -> torch.Tensor | None:
        read.append(wanted)
        return inner(self, wanted)

    monkeypatch.setattr(CutLosses, "_read", counted)

    def planned() -> dict[str, Any]:
        plan = make_plan(llama_scores, 3, model=llama, windows=windows, effort="quick").to_dict()
        return {**plan, "created": ""}

    wanted = planned()
    assert len(read) == len(set(read)) == 12

    def body(rank: int) -> int:
        read.clear()
        with ranks.processes():
            found = planned()
            shares = ranks.gather(len(read))
        assert found == wanted
        assert sum(shares) < 12 + 6  # few are read in vain
        return max(shares)

    for count, most in ((2, 9), (3, 7)):
        ended = Processes(count, body, tmp_path / str(count)).wait()
        assert [end.code for end in ended] == [ended[0].code] * count, ended[0].errors
        assert 12 / count <= ended[0].code <= most
