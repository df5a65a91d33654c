"""Plans by effort on a model: what they choose by, what they cost and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.divergence import Teacher
from simdiff.planning import effort as module
from simdiff.planning.batches import BatchReader
from simdiff.planning.block_costs import block_costs
from simdiff.planning.budget import Budget
from simdiff.planning.cost import prices_of
from simdiff.planning.effort import promising
from simdiff.planning.effort_search import TOKENS_OF_TRUST
from simdiff.planning.make_plan import make_plan
from simdiff.planning.options import PlanOptions
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import reproduction
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import layers_removed

WINDOWS = torch.randint(0, 97, (8, 33), generator=torch.Generator().manual_seed(5))


def mixed(model: PreTrainedModel, plan: tuple[int, ...], windows: torch.Tensor) -> float:
    """Divergence and rise of the loss, weighed as the search does."""
    with torch.no_grad():
        dense = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        with layers_removed(model, plan):
            cut = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    teacher = Teacher.of_logits(dense, windows[:, 1:].flatten())
    divergence, loss = (teacher.measures(cut) - teacher.measures(dense)).mean(1).tolist()
    share = len(dense) / (len(dense) + TOKENS_OF_TRUST)
    return (1 - share) * divergence + share * loss


@pytest.mark.parametrize("effort", ["normal", "thorough"])
def test_the_plan_of_least_divergence(
    effort: str, llama: PreTrainedModel, llama_scores: LayerScores, tmp_path: Path
) -> None:
    plan = PlanOptions(budget=Budget(num_layers=2), effort=effort, bootstrap=0).plan(
        llama_scores, llama, WINDOWS
    )
    read = [c for c in plan.candidates if c["nll"] is not None]
    most = max(c["num_windows"] for c in read)
    best = min((c for c in read if c["num_windows"] == most), key=lambda c: c["nll"])
    assert sorted(plan.removed) == best["removed"]
    for found in read:
        wanted = mixed(llama, found["removed"], WINDOWS[: found["num_windows"]])
        assert found["nll"] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    prices = prices_of(llama)
    scored = round(llama_scores.num_tokens / WINDOWS.shape[1]) * 6
    greedy = prices.total(prices.greedy(2, 4))
    search = plan.search
    spent = search["layers_run"] + prices.head / search["head_stride"] * search["heads_run"]
    assert search["share_of_greedy"] == pytest.approx((spent + scored) / greedy, abs=1e-3)
    # What a race must read at least may go beyond a budget of a tiny model.
    assert spent < max((0.2 if effort == "normal" else 1) * greedy - scored, greedy / 20) + 40
    assert any(note.startswith(f"effort {effort}: ") for note in plan.notes)
    assert plan.choice_agreement is not None
    assert f"on {plan.choice_agreement:.0%} of 500 draws" in " ".join(plan.notes)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert f"--evaluation-windows 4 --effort {effort} --num-layers 2" in " ".join(
        reproduction(plan, None)
    )


def test_none_reads_nothing_and_quick_is_not_recorded_as_a_search(
    llama: PreTrainedModel, llama_scores: LayerScores
) -> None:
    alone = make_plan(llama_scores, 2)
    assert make_plan(llama_scores, 2, model=llama, windows=WINDOWS, effort="none") == alone
    few = make_plan(llama_scores, 2, model=llama, windows=WINDOWS[:4], effort="quick")
    quick = make_plan(
        llama_scores, 2, model=llama, windows=WINDOWS, evaluation_windows=4, effort="quick"
    )
    assert quick == few
    assert not few.search
    assert few.options["effort"] == "quick"
    with pytest.raises(SimdiffError, match="effort must be one of none, quick, normal, thorough"):
        PlanOptions(effort="much").count(llama_scores.model)


def test_cuts_that_no_config_expresses(
    llama: PreTrainedModel, llama_scores: LayerScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = make_plan(llama_scores, 2, model=llama, windows=WINDOWS, effort="normal").removed
    asked = []

    def expressible(model: PreTrainedModel, plan: tuple[int, ...]) -> bool:
        asked.append(plan)
        return set(plan) != set(free)

    monkeypatch.setattr(module, "_expressible", expressible)
    other = make_plan(llama_scores, 2, model=llama, windows=WINDOWS, effort="normal")
    assert set(other.removed) != set(free)
    assert {len(plan) for plan in asked} == {2}
    assert len(asked) == len({*asked})


def test_goes_on_after_an_interruption(
    llama: PreTrainedModel,
    llama_scores: LayerScores,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    journal, read, calls = tmp_path / "plan.json.search.json", BatchReader.__call__, []

    def reader(self, plans, windows):
        calls.append((plans, windows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(self, plans, windows)

    def planned(**options) -> PruningPlan:
        return make_plan(
            llama_scores, 2, model=llama, windows=WINDOWS, effort="thorough", **options
        )

    monkeypatch.setattr(BatchReader, "__call__", reader)
    with pytest.raises(KeyboardInterrupt):
        planned(journal=journal)
    found = planned(journal=journal)
    asked, again = calls[:3], calls[4:]
    assert asked
    assert not {(p, w) for ps, ws in asked for p in ps for w in ws} & {
        (p, w) for ps, ws in again for p in ps for w in ws
    }
    assert planned() == found
    assert len(calls) == 4 + len(again) + len(asked) + len(again)
    content = json.loads(journal.read_text())
    content["divergences"][0]["runs"] = "many"
    journal.write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="finished evaluations, but is damaged"):
        planned(journal=journal)
    with pytest.raises(SimdiffError, match="is of another run"):
        make_plan(
            llama_scores, 2, model=llama, windows=WINDOWS.flip(1), effort="normal", journal=journal
        )


def test_the_layers_that_are_removed_first(llama_scores: LayerScores) -> None:
    order = promising(llama_scores)
    assert sorted(order) == list(range(6))
    costs = block_costs(llama_scores).values
    influence = llama_scores.metrics["cosine_distance"].mean
    lowest = {
        min(range(6), key=lambda k: costs[k][k + 1]),
        min(range(6), key=influence.__getitem__),
    }
    assert lowest <= {*order[:2]}
