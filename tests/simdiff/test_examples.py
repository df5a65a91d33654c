"""The examples run, and what they print is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from simdiff.models.loading import load_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return [
        "--model",
        str(tiny_checkpoint),
        "--text",
        str(tiny_text),
        "--windows",
        "3",
        "--window-length",
        "16",
    ]


def test_replaced_loops_give_the_same_numbers(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    differences = example("replace_scoring_loop").main([*flags, "--block", "2"])
    assert set(differences) == {"block influence", "angular distance", "cosine of blocks"}
    assert max(differences.values()) < 1e-6
    assert capsys.readouterr().out.count("same order: True") == 3


def test_the_pruning_loop_removes_what_it_scores_lowest(
    flags: list[str], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = example("pruning_loop")
    removed = loop.main([*flags, "--num-layers", "3"])
    assert len(set(removed)) == 3
    assert capsys.readouterr().out.count("perplexity") == 4

    # Layer by layer in float64: the first to go is the one of the lowest importance.
    model, _ = load_model(str(tiny_checkpoint), dtype="float32", device="cpu")
    tokens = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    summary = loop.score_layers(model, [tokens])
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states[:-1]
    for layer in range(len(states) - 1):
        x, y = states[layer].double(), states[layer + 1].double()
        cosine = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        relative = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()
        torch.testing.assert_close(summary["cosine_distance"].mean[layer], cosine)
        torch.testing.assert_close(summary["relative_difference"].mean[layer], relative)
    lowest = summary["cosine_distance"].mean + summary["relative_difference"].mean
    assert loop.least_important(summary) == int(lowest.argmin())


def test_the_whole_way(flags: list[str], tmp_path: Path) -> None:
    perplexities = example("prune_and_recover").main([*flags, "--output", str(tmp_path / "out")])
    for name in ("pruned", "recovered"):
        model, _ = load_model(str(tmp_path / "out" / name))
        assert model.config.num_hidden_layers == 5
    assert (tmp_path / "out" / "recovered" / "recovery.json").exists()
    assert list(perplexities) == ["dense", "pruned", "recovered"]
    assert all(90 < value < 110 for value in perplexities.values())  # 97 words, random weights
