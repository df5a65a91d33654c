"""The search over sub-layers: what it reads, what it chooses by, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError, SurgeryError
from simdiff.evaluation.divergence import Teacher
from simdiff.planning.batches import runs_of
from simdiff.planning.effort_search import TOKENS_OF_TRUST
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers import effort as module
from simdiff.sublayers.effort import SublayerReader
from simdiff.sublayers.plan import SublayerPlan, plan_sublayers
from simdiff.sublayers.structure import find_sublayers
from simdiff.sublayers.surgery import sublayers_removed

WINDOWS = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(5))


def measures(model: PreTrainedModel, names: list, windows: torch.Tensor) -> torch.Tensor:
    """Divergence and loss of all tokens by plain forwards."""
    with torch.no_grad():
        dense = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        teacher = Teacher.of_logits(dense, windows[:, 1:].flatten())
        if not names:
            return teacher.measures(dense)
        with sublayers_removed(model, names):
            cut = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return teacher.measures(cut)


def test_the_reader_reads_what_plain_forwards_do(llama: PreTrainedModel) -> None:
    """Neighbouring plans share states within a layer's bounds, and none beyond."""
    found = find_sublayers(llama)
    plans = [(), (0,), (2, 3), (2, 7), (3,), (3, 6), (3, 7), (5, 11), (10,), (11,)]
    read = SublayerReader(llama, WINDOWS, found, 1)(plans, [0, 1])
    for plan in plans:
        for window in (0, 1):
            names = [found.names[unit] for unit in plan]
            wanted = runs_of(measures(llama, names, WINDOWS[window : window + 1]))
            torch.testing.assert_close(read[plan, window], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", ["attention", "sublayer"])
def test_the_plan_of_least_divergence_and_loss(
    llama: PreTrainedModel, scores: LayerScores, unit: str, tmp_path: Path
) -> None:
    alone = plan_sublayers(scores, unit, 2, protect=(1,))
    plan = plan_sublayers(
        scores, unit, 2, protect=(1,), model=llama, windows=WINDOWS, effort="thorough"
    )

    def loss(chosen: SublayerPlan) -> float:
        extra = measures(llama, list(chosen.removed), WINDOWS) - measures(llama, [], WINDOWS)
        divergence, rise = extra.mean(1).tolist()
        share = WINDOWS[:, 1:].numel() / (WINDOWS[:, 1:].numel() + TOKENS_OF_TRUST)
        return (1 - share) * divergence + share * rise

    assert loss(plan) < loss(alone), "random weights: scores know nothing"
    assert {name.layer for name in plan.removed}.isdisjoint({1})
    assert {name.kind for name in plan.removed} <= {"attention", *(["mlp"] * (unit != "attention"))}
    assert plan.ranking == alone.ranking
    assert plan.options == {"evaluation-windows": 4, "effort": "thorough"}
    assert "sub-layers and " in " ".join(plan.notes)
    plan.save(tmp_path / "plan.json")
    assert SublayerPlan.load(tmp_path / "plan.json") == plan
    assert plan_sublayers(scores, unit, 2, model=llama, windows=WINDOWS, effort="none").search == {}


def test_goes_on_after_an_interruption(
    llama: PreTrainedModel,
    scores: LayerScores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal, read, calls = tmp_path / "plan.json.search.json", SublayerReader.__call__, []

    def reader(self, plans, windows):
        calls.append((plans, windows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, plans, windows)

    def planned() -> SublayerPlan:
        return plan_sublayers(scores, "mlp", 2, model=llama, windows=WINDOWS, journal=journal)

    monkeypatch.setattr(SublayerReader, "__call__", reader)
    with pytest.raises(KeyboardInterrupt):
        planned()
    found = planned()
    assert not {(p, w) for ps, ws in calls[:2] for p in ps for w in ws} & {
        (p, w) for ps, ws in calls[3:] for p in ps for w in ws
    }
    journal.unlink()
    assert planned() == found


def test_what_is_refused(
    llama: PreTrainedModel, scores: LayerScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SimdiffError, match="none, normal or thorough for sub-layers, got 'quick'"):
        plan_sublayers(scores, "mlp", 2, model=llama, windows=WINDOWS, effort="quick")

    @module.contextlib.contextmanager
    def refused(model, names, found):
        if {name.layer for name in names} & {3}:
            raise SurgeryError("shared keys")
        with sublayers_removed(model, names, found):
            yield

    monkeypatch.setattr(module, "sublayers_removed", refused)
    monkeypatch.setattr(SublayerReader, "without", _without)
    plan = plan_sublayers(scores, "sublayer", 2, model=llama, windows=WINDOWS)
    assert 3 not in {name.layer for name in plan.removed}
    monkeypatch.setattr(module, "stream_of", lambda model: object())
    with pytest.raises(SimdiffError, match="needs the whole model in memory"):
        plan_sublayers(scores, "mlp", 2, model=llama, windows=WINDOWS)


@module.contextlib.contextmanager
def _without(self, plan, course):
    """As the reader's own, with the function that refuses nothing."""
    names = [self._found.names[unit] for unit in plan]
    with module.contextlib.ExitStack() as stack:
        if names:
            stack.enter_context(sublayers_removed(self._model, names, self._found))
        yield
