"""`simdiff score` until the plan is stable, and the plan made from it."""

from __future__ import annotations

import json
from pathlib import Path

from simdiff.planning.plan import PruningPlan
from support.commands import simdiff


def test_commands(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys) -> None:
    """Until stable, then a plan with the model on the windows used, and its frequencies."""
    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    text = ("--text", tiny_text, "--window-length", 16, "--num-windows", 2, "--batch-size", 2)
    until = ("--calibrate-until-stable", "--max-windows", 8, "--stable-confidence", 1)
    kind = ("--num-layers", 2)
    command = ("score", tiny_checkpoint, *text, *until, *kind, "--skip-leading", 1, "-o", scores)
    assert simdiff(*command) == 0
    printed = capsys.readouterr()
    stability = json.loads(scores.read_text())["stability"]
    assert f"Note: {stability['note']}." in " ".join(printed.out.split())
    assert "2 windows: the plan comes in" in printed.err
    used = stability["checks"][-1]["num_windows"]
    assert json.loads(scores.read_text())["calibration"]["num_windows"] == used
    assert simdiff("plan", scores, *kind, "--model", tiny_checkpoint, "-o", plan) == 0
    printed = capsys.readouterr()
    loaded = PruningPlan.load(plan)
    assert loaded.confidence is not None
    assert loaded.confidence.num_groups == used
    assert loaded.confidence.num_resamples == 500
    assert ("in draws" in printed.out) == (loaded.draws is not None), "shares of another plan"
    assert simdiff("plan", scores, *kind, "--overwrite", "-o", plan) == 0
    printed = capsys.readouterr()
    loaded = PruningPlan.load(plan)
    assert "in draws" in printed.out
    assert loaded.draws is loaded.confidence is not None
    for share in loaded.confidence.plan_frequency:
        assert f"{share:.0%}" in printed.out
    assert simdiff("plan", scores, *kind, "--bootstrap", 0, "--overwrite", "-o", plan) == 0
    assert PruningPlan.load(plan).confidence is None
    assert "in draws" not in capsys.readouterr().out
    refused = ("score", tiny_checkpoint, *text, "--skip-leading", 16, "-o", tmp_path / "x.json")
    assert simdiff(*refused) == 2
    assert "below the window length 16, got 16" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
