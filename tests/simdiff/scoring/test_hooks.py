"""Hooks on layers: what they take, what they refuse, and that they go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simdiff.errors import SimdiffError
from simdiff.scoring.hooks import LayerHooks
from simdiff_kernels import RunningBlockScores, RunningScores


def test_layers_out_of_order_and_overwritten_states_are_refused() -> None:
    class Add(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + 1

    layers = nn.ModuleList([Add(), Add()])
    with LayerHooks(layers, RunningScores(2), RunningBlockScores(2)), torch.no_grad():
        with pytest.raises(
            SimdiffError, match="once and in order .*got layer 1 where layer 0 was due"
        ):
            layers[1](torch.ones(1, 3))
        state = layers[0](torch.ones(1, 3))
        copy = state.clone()
        state.zero_()
        with pytest.raises(SimdiffError, match="state 1 was written over"):
            layers[1](copy)


class Residual(nn.Module):
    """A layer with the outputs that decoder layers have had."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden_states: Tensor) -> object:
        if self.kind == "in-place":
            return hidden_states.mul_(1.5)
        if self.kind == "raises":
            raise RuntimeError("broken layer")
        if self.kind == "dictionary":
            return {"hidden": hidden_states}
        out = hidden_states * 1.5
        return (out, None) if self.kind == "tuple" else out


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_layers_of_both_kinds(kind: str, by_keyword: bool) -> None:
    layers, running = nn.ModuleList([Residual(kind)]), RunningScores(1)
    states = torch.randn(2, 3, 8)
    with LayerHooks(layers, running):
        layers[0](hidden_states=states) if by_keyword else layers[0](states)
    summary = running.finish()
    assert summary.num_tokens.tolist() == [6]
    assert summary["relative_difference"].mean.item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("raises", "broken layer"),
        ("in-place", "writes its output over its input"),
        ("dictionary", "must return a tensor or a tuple that starts with one, got dict"),
    ],
)
def test_hooks_go_even_when_the_forward_raises(kind: str, wanted: str) -> None:
    layers = nn.ModuleList([Residual("tensor"), Residual(kind)])
    with (
        pytest.raises((RuntimeError, SimdiffError), match=wanted),
        LayerHooks(layers, RunningScores(2)),
    ):
        layers[1](layers[0](torch.randn(2, 3, 8)))
    for layer in layers:
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
