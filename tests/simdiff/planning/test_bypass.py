"""Layers passed by against models cut for real."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.planning.bypass import BypassEvaluator
from support.cuts import really_cut


@pytest.mark.parametrize("budget", [0, 3 * 12 * 32 * 4 * 2, 1 << 20])
def test_a_layer_passed_by_is_a_layer_cut(
    tiny: PreTrainedModel, windows: torch.Tensor, budget: int
) -> None:
    evaluator = BypassEvaluator(tiny, windows, memory_budget=budget)
    for base in ((), (2,), (2, 4), (0, 5)):
        evaluator.rebase(base)
        for removed in ((0,), (3,), (1, 2), (2, 4, 5), (2, 3), (0, 1, 2, 3, 5), base):
            wanted = really_cut(tiny, windows, frozenset(removed))
            assert evaluator.losses(removed) == wanted, (base, removed)  # to the last bit
    assert not any("forward" in vars(layer) for layer in tiny.base_model.modules())


def test_layers_that_return_tuples(windows: torch.Tensor) -> None:
    torch.manual_seed(7)
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=5, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    evaluator = BypassEvaluator(model, windows)
    evaluator.rebase((3,))
    for removed in ((0,), (1, 3), (2, 3, 4)):
        assert evaluator.losses(removed) == really_cut(model, windows, frozenset(removed))


def test_only_layers_after_the_first_change_run(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    counts = {}
    for budget in (0, 2 * 3 * 12 * 32 * 4, 1 << 20):
        evaluator = BypassEvaluator(llama, windows, memory_budget=budget)
        evaluator.losses(())
        before = evaluator.layers_run
        for layer in range(6):
            evaluator.losses((layer,))
        counts[budget] = (evaluator.layers_run - before) // 3
    # All states kept: layer l is passed by and 5 - l others run. Two kept, before layers 2 and 4.
    assert list(counts.values()) == [6 * 5, 5 + 5 + 3 + 3 + 1 + 1, 5 + 4 + 3 + 2 + 1 + 0]


def test_states_of_the_last_base_go_before_those_of_the_next(
    llama: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both lie in memory at once, twice what was allowed."""
    evaluator = BypassEvaluator(llama, windows)
    entering, held = evaluator._partial.entering, []

    def counted(*given: Any) -> Any:
        held.append([len(states) for states in evaluator._states])
        return entering(*given)

    monkeypatch.setattr(evaluator._partial, "entering", counted)
    evaluator.losses(())
    evaluator.rebase((3,))
    evaluator.losses((3, 4))
    assert held == [[0, 0, 0], [5, 0, 0], [5, 5, 0]] * 2


def test_states_written_over_are_not_reused(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    layer = llama.model.layers[3]
    forward = layer.forward
    layer.forward = lambda states, **kwargs: states.copy_(forward(states, **kwargs))
    with pytest.raises(SimdiffError, match="a layer from 2 on writes over what enters it"):
        BypassEvaluator(llama, windows).losses((2,))
    assert all(map(math.isfinite, BypassEvaluator(llama, windows, memory_budget=0).losses((2,))))


def test_choices_of_layers_that_are_refused(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    evaluator = BypassEvaluator(llama, windows)
    assert evaluator.num_layers == 6
    for removed, message in (
        ((6,), "layers to pass by must be indices from 0 to 5, got 6"),
        ((1, 1), "layers to pass by must be named once each, got .1, 1."),
        (range(6), "must leave a layer, got all 6 layers"),
    ):
        with pytest.raises(SimdiffError, match=message):
            evaluator.losses(removed)
