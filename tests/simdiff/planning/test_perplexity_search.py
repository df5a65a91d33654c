"""Searches against models cut for real, interruptions, and perplexities that are not numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import Evaluation
from simdiff.planning.perplexity_search import (
    greedy_plan,
    greedy_search,
    one_shot_importance,
    one_shot_search,
    with_exclusions,
)
from simdiff.planning.selection import select
from support.cuts import journal, really_cut


def plain_greedy(model: PreTrainedModel, windows: torch.Tensor, count: int) -> list[int]:
    gone: list[int] = []
    while len(gone) < count:
        losses = {
            layer: sum(really_cut(model, windows, frozenset([*gone, layer])))
            for layer in range(6)
            if layer not in gone
        }
        gone.append(min(losses, key=lambda layer: losses[layer]))
    return gone


def test_greedy_is_the_plain_search(tiny: PreTrainedModel, windows: torch.Tensor) -> None:
    evaluator, evaluate = journal(tiny, windows)
    steps = greedy_search(evaluate, 6, 4, rebase=evaluator.rebase)
    assert [step.layer for step in steps] == plain_greedy(tiny, windows, 4)
    assert evaluate.computed == 6 + 5 + 4 + 3
    protected = greedy_search(evaluate, 6, 2, (steps[0].layer,), evaluator.rebase)
    assert steps[0].layer not in {step.layer for step in protected}


def test_one_shot_is_the_plain_search(tiny: PreTrainedModel, windows: torch.Tensor) -> None:
    _, evaluate = journal(tiny, windows)
    step = one_shot_search(evaluate, 6, 3)
    losses = [sum(really_cut(tiny, windows, frozenset([layer]))) / 3 for layer in range(6)]
    values = one_shot_importance(step, 6).values
    assert values == pytest.approx(losses, rel=1e-12)
    assert step.layer == losses.index(min(losses))


class InterruptedError(Exception):
    """Stands for a key press, a full disk, a machine that is taken away."""


def test_an_interrupted_search_goes_on(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "evaluations.json"
    evaluator, evaluate = journal(llama, windows)
    wanted = greedy_search(evaluate, 6, 3, rebase=evaluator.rebase)

    evaluator, evaluate = journal(llama, windows, path)
    seen = 0

    def until_the_eighth(removed: frozenset[int]) -> Evaluation:
        nonlocal seen
        seen += 1
        if seen > 8:
            raise InterruptedError
        return evaluate(removed)

    with pytest.raises(InterruptedError), evaluate:
        greedy_search(until_the_eighth, 6, 3, rebase=evaluator.rebase)
    assert len(json.loads(path.read_text())["evaluations"]) == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluations.json"]

    evaluator, evaluate = journal(llama, windows, path)
    with evaluate:
        steps = greedy_search(evaluate, 6, 3, rebase=evaluator.rebase)
    assert evaluate.computed == 6 + 5 + 4 - 8
    assert [step.layer for step in steps] == [step.layer for step in wanted]
    assert [step.candidates for step in steps] == [step.candidates for step in wanted]
    _, again = journal(llama, windows, path)
    greedy_search(again, 6, 3)
    assert again.computed == 0


def broken_without(layers: set[int]) -> dict[int, float]:
    """Losses of the model without one layer: none where the layer is among these."""
    return {layer: math.nan if layer in layers else 2.0 - layer / 10 for layer in range(6)}


def test_what_is_not_finite_is_never_chosen() -> None:
    def evaluate(removed: frozenset[int]) -> Evaluation:
        if 3 in removed:
            return Evaluation((900.0, 1.0), 0.1)
        value = sum(broken_without({5, 4})[layer] for layer in removed)
        return Evaluation((value, value), 0.1)

    steps = greedy_search(evaluate, 6, 2)
    assert [step.layer for step in steps] == [2, 1]
    assert steps[0].excluded == (4, 5)
    plan = greedy_plan(steps, 2, num_layers=6, model={}, calibration={})
    assert plan.removed == (2, 1)
    assert "step 1: without layer 4, 5 the perplexity is NaN or Inf" in plan.notes[0]
    json.dumps(plan.to_dict(), allow_nan=False)

    def hopeless(removed: frozenset[int]) -> Evaluation:
        return Evaluation((math.nan,), 0.1)

    with pytest.raises(SimdiffError, match="finite without some layer.*all 6 candidates"):
        greedy_search(hopeless, 6, 2)
    with pytest.raises(SimdiffError, match="5 layers must have a finite perplexity.*got 4 of 6"):
        one_shot_search(evaluate, 6, 5)
    with pytest.raises(SimdiffError, match="1 to the 2 steps made, got 3"):
        greedy_plan(steps, 3, num_layers=6, model={}, calibration={})


def test_a_layer_without_which_the_model_overflows(
    llama: PreTrainedModel, windows: torch.Tensor, llama_scores
) -> None:
    """Layer 0 writes what layer 1 divides by: without it everything is NaN."""
    first, second = llama.model.layers[0], llama.model.layers[1]
    plain_first, plain_second = first.forward, second.forward
    mark = 1000.0

    def writes(states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        states = plain_first(states, **kwargs).clone()
        states[..., 0] = mark
        return states

    def reads(states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        scale = (states[..., :1] == mark).to(states)
        return plain_second(states, **kwargs) / scale

    first.forward, second.forward = writes, reads
    evaluator, evaluate = journal(llama, windows)
    step = one_shot_search(evaluate, 6, 3)
    assert step.excluded == (0,)
    plan = with_exclusions(select(llama_scores, one_shot_importance(step, 6), 3), [step])
    assert 0 not in plan.removed
    assert "without layer 0" in plan.notes[-1]
    steps = greedy_search(evaluate, 6, 3, rebase=evaluator.rebase)
    assert 0 not in {step.layer for step in steps} or 1 in {
        step.layer for step in steps[: [s.layer for s in steps].index(0)]
    }
