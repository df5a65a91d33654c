"""Searches on streamed models: the plans and losses of a model in memory, in few passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import token_losses, window_losses
from simdiff.evaluation.streamed_losses import in_few_passes, losses_of
from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.streamed import stream_of
from simdiff.planning.budget import Budget
from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.options import PlanOptions
from simdiff.planning.streamed_search import StreamedEvaluator
from simdiff.scoring.calibration_pass import score
from support.streams import stored, streamed, whole

IDS = torch.randint(3, 97, (4, 10), generator=torch.Generator().manual_seed(1))
PLANS = (frozenset(), {1}, {0}, {0, 1}, {2, 4}, {5}, {1, 2, 3, 4, 5}, {0, 1, 2, 3, 4})


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "bamba"])
def test_losses_of_plans_in_one_pass(family: str, tmp_path: Path) -> None:
    path = stored(family, tmp_path / "model")
    known, model = whole(path), streamed(path, memory=0, folder=tmp_path / "states")
    there, here = BypassEvaluator(known, IDS), StreamedEvaluator(model, IDS)
    stream = stream_of(model)
    assert stream is not None
    before = stream.bytes_read
    found = in_few_passes(model, lambda: [here.losses(plan) for plan in PLANS])
    assert found == [there.losses(plan) for plan in PLANS]
    assert stream.bytes_read - before == sum(map(stream.num_bytes, range(7)))
    assert losses_of(model, token_losses).passes == 1
    assert window_losses(model, IDS) == window_losses(known, IDS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored("llama", tmp_path_factory.mktemp("llama") / "model")


CRITERIA = {"simdiff": 2, "greedy-perplexity": 3, "one-shot-perplexity": 1, "simdiff-masd-swept": 1}


def test_layers_that_no_plan_needs_are_not_read(llama: Path) -> None:
    model = streamed(llama)
    here, stream = StreamedEvaluator(model, IDS), stream_of(model)
    assert stream is not None
    before = stream.bytes_read
    (losses,) = in_few_passes(model, lambda: [here.losses({1, 3})])
    assert losses == BypassEvaluator(whole(llama), IDS).losses({1, 3})
    assert stream.bytes_read - before == sum(map(stream.num_bytes, (0, 2, 4, 5, 6)))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_plans_are_those_of_the_whole_model(llama: Path, criterion: str) -> None:
    known, model = whole(llama), streamed(llama)
    scores = score(known, list(IDS.split(2)), progress=False)
    # Of a streamed model effort quick is the default.
    options = PlanOptions(
        criterion=criterion, budget=Budget(num_layers=3), bootstrap=0, effort="quick"
    )
    wanted, plan = (options.plan(scores, one, IDS).to_dict() for one in (known, model))
    assert plan == {**wanted, "created": plan["created"]}
    assert losses_of(model, token_losses).passes <= CRITERIA[criterion]


def test_a_kill_between_passes_repeats_none(llama: Path, tmp_path: Path) -> None:
    scores = score(whole(llama), list(IDS.split(2)), progress=False)
    options = PlanOptions(criterion="greedy-perplexity", budget=Budget(num_layers=2), bootstrap=0)
    model = streamed(llama, folder=tmp_path / "states")
    plan = options.plan(scores, model, IDS)
    again = streamed(llama, folder=tmp_path / "states")  # its folder was not removed
    stream = stream_of(again)
    assert stream is not None
    before = stream.bytes_read
    assert options.plan(scores, again, IDS).removed == plan.removed
    assert stream.bytes_read == before


def test_a_kill_within_a_later_pass(llama: Path, tmp_path: Path, monkeypatch) -> None:
    """The passes before it are known, and it goes on from its last finished layer."""
    scores = score(whole(llama), list(IDS.split(2)), progress=False)
    options = PlanOptions(criterion="greedy-perplexity", budget=Budget(num_layers=2), bootstrap=0)
    plan = options.plan(scores, whole(llama), IDS)
    step, layers = LayerByLayer.step, []

    def killed(self, batch, states, layer):
        layers.append(layer)
        if layer == 3 and 5 in layers:  # the first pass is over
            raise KeyboardInterrupt
        return step(self, batch, states, layer)

    with monkeypatch.context() as patch:
        patch.setattr(LayerByLayer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            options.plan(scores, streamed(llama, folder=tmp_path / "states"), IDS)
    model = streamed(llama, folder=tmp_path / "states")
    assert options.plan(scores, model, IDS).removed == plan.removed
    stream = stream_of(model)
    assert stream is not None
    assert stream.bytes_read == sum(map(stream.num_bytes, range(3, 7)))


def test_errors_of_a_search_are_its_own(llama: Path) -> None:
    model = streamed(llama)
    with pytest.raises(SimdiffError, match="must leave a layer, got all 6 layers"):
        in_few_passes(model, lambda: StreamedEvaluator(model, IDS).losses(range(6)))
    with pytest.raises(SimdiffError, match="token ids must be 0 to 96"):
        StreamedEvaluator(model, IDS + 90)
