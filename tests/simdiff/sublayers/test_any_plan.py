"""Plans of layers or of sub-layers, applied in memory; refused where files are cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from simdiff.cli import main
from simdiff.errors import SimdiffError
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.models.loading import load_model
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.any_plan import cut_in_memory, load_any_plan
from simdiff.sublayers.plan import SublayerPlan, plan_sublayers
from simdiff.sublayers.surgery import sublayers_removed


def test_from_scores_to_perplexity(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, and the same by hand; where files are cut such a plan is refused."""
    scores, plan = str(tmp_path / "scores.json"), str(tmp_path / "plan.json")
    model, text = str(tiny_checkpoint), ["--text", str(tiny_text), "--window-length", "20"]
    text += ["--num-windows", "4"]
    assert main(["score", model, *text, "--sublayers", "-o", scores]) == 0
    assert "attention 3" in capsys.readouterr().out
    chosen = ["plan", scores, "--unit", "sublayer", "-o", plan]
    assert main([*chosen, "--num-layers", "4"]) == 0
    assert "REMOVE: rank 1 of 12" in capsys.readouterr().out
    assert main(["eval", model, *text, "--plan", plan, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    dense, pruned = results["models"].values()
    loaded, tokenizer = load_model(model)
    removed = SublayerPlan.load(Path(plan)).removed
    assert results["removed"] == [str(name) for name in removed]
    from simdiff.data.text import token_windows

    windows = token_windows(
        str(tiny_text), tokenizer, part="held-out", num_windows=4, window_length=20
    ).tokens
    by_hand = perplexity(loaded, windows).perplexity
    assert dense["perplexity"] == pytest.approx(by_hand, rel=1e-6)
    with sublayers_removed(loaded, removed):
        by_hand = perplexity(loaded, windows).perplexity
    assert pruned["perplexity"] == pytest.approx(by_hand, rel=1e-6)
    assert dense["perplexity"] != pruned["perplexity"]

    for command in (
        ["prune", model, "--plan", plan, "-o", str(tmp_path / "out")],
        ["export", plan, "--format", "list"],
    ):
        assert main(command) == 2
        assert "no config of a checkpoint says that one is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*chosen, "--overwrite", "--ratio", "0.5"]) == 2
    assert "must go with --num-layers" in capsys.readouterr().err


def test_plans_of_layers_in_memory(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, plan, small = (str(tmp_path / name) for name in ("s.json", "p.json", "small"))
    model, text = str(tiny_checkpoint), ["--text", str(tiny_text), "--window-length", "20"]
    text += ["--num-windows", "4"]
    assert main(["score", model, *text, "-o", scores]) == 0
    assert main(["plan", scores, "--num-layers", "2", "-o", plan]) == 0
    assert main(["prune", model, "--plan", plan, "-o", small]) == 0
    capsys.readouterr()
    assert main(["eval", model, *text, "--plan", plan, "--json"]) == 0
    in_memory = [*json.loads(capsys.readouterr().out)["models"].values()]
    assert main(["eval", model, small, *text, "--json"]) == 0
    from_files = [*json.loads(capsys.readouterr().out)["models"].values()]
    assert from_files[1]["weights"].pop("files")  # a cut in memory has none
    assert in_memory == from_files
    assert isinstance(load_any_plan(Path(plan)), PruningPlan)
    assert main(["eval", model, small, *text, "--plan", plan]) == 2
    assert "--plan and --remove go with one model, got 2" in capsys.readouterr().err


def test_plans_for_another_model(scores: LayerScores, llama: PreTrainedModel) -> None:
    plan = plan_sublayers(scores, "mlp", 2)
    other = replace(plan, model={**plan.model, "fingerprint": "other"})
    with pytest.raises(SimdiffError, match="another model"), cut_in_memory(llama, other):
        pass
