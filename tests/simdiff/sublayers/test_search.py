"""The greedy search over sub-layers against the plain one, and its interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import EvaluationJournal, evaluation_key
from simdiff.evaluation.losses import window_losses
from simdiff.sublayers.search import search_sublayers
from simdiff.sublayers.structure import KINDS, SublayerName
from simdiff.sublayers.surgery import sublayers_removed

TEXT = {"source": "random", "seed": 2}


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 97, (2, 10), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("unit", ["attention", "sublayer"])
def test_greedy_is_the_plain_search(
    llama: PreTrainedModel, windows: torch.Tensor, unit: str
) -> None:
    every = [SublayerName(k, kind) for k in range(6) for kind in KINDS if k != 1]
    gone: list[SublayerName] = []
    while len(gone) < 3:
        losses = {}
        for name in every:
            if name not in gone and unit in ("sublayer", name.kind):
                with sublayers_removed(llama, [*gone, name]):
                    losses[name] = sum(window_losses(llama, windows, description=None))
        gone.append(min(losses, key=losses.__getitem__))
    plan = search_sublayers(llama, windows, unit, 3, text=TEXT, protect=(1,))
    assert plan.removed == tuple(gone)
    assert plan.removed == plan.ranking[:3]


def test_an_interrupted_search_goes_on(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "evaluations.json"
    wanted = search_sublayers(llama, windows, "mlp", 2, text=TEXT)
    calls = 0

    def counted(*args: object, **kwargs: object) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return window_losses(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("simdiff.sublayers.search.window_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        search_sublayers(llama, windows, "mlp", 2, text=TEXT, journal=path)
    assert search_sublayers(llama, windows, "mlp", 2, text=TEXT, journal=path) == wanted
    assert calls == 6 + 5 + 1, "7 were known, one was interrupted"
    key = evaluation_key(llama, windows, TEXT)
    with pytest.raises(SimdiffError, match="of another run, which differs in sublayers"):
        EvaluationJournal(key, path, lambda removed: [0.0])


@pytest.mark.parametrize("count", [0, 7])
def test_bad_numbers(llama: PreTrainedModel, windows: torch.Tensor, count: int) -> None:
    with pytest.raises(SimdiffError, match=f"1 to the 6 free sub-layers .mlp., got {count}"):
        search_sublayers(llama, windows, "mlp", count, text=TEXT)
