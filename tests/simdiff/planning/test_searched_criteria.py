"""Searches and sweeps as criteria of `simdiff plan` and `run`: right, resumed, refused."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from pathlib import Path

import pytest

from simdiff.cli import parser
from simdiff.evaluation.losses import window_losses
from simdiff.jobs.calibrate import calibrated
from simdiff.models.loading import load_model
from simdiff.planning.alpha_sweep import alpha_intervals
from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.names import SEARCHED
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import layers_removed
from support.commands import SMALL, simdiff


@pytest.fixture
def scores(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "scores.json"
    assert simdiff("score", tiny_checkpoint, "--text", tiny_text, *SMALL, "-o", path) == 0
    return path


def test_plans_are_those_of_plain_evaluations(
    tiny_checkpoint: Path, scores: Path, tmp_path: Path
) -> None:
    model, windows = calibrated(str(tiny_checkpoint), LayerScores.load(scores))

    def nll(removed: tuple[int, ...]) -> float:
        with layers_removed(model, removed):
            return math.fsum(window_losses(model, windows[:3], description=None)) / 3

    def planned(criterion: str) -> PruningPlan:
        path = tmp_path / f"{criterion}.json"
        command = (
            "plan",
            scores,
            "--criterion",
            criterion,
            "--num-layers",
            2,
            "--model",
            tiny_checkpoint,
            "--evaluation-windows",
            3,
            "-o",
            path,
        )
        assert simdiff(*command) == 0
        assert not path.with_name(path.name + ".search.json").exists()
        plan = PruningPlan.load(path)
        assert "evaluated on the first 3 windows" in " ".join(plan.notes)
        return plan

    alone = {layer: nll((layer,)) for layer in range(6)}
    one_shot = planned("one-shot-perplexity")
    assert one_shot.removed == tuple(sorted(alone, key=alone.__getitem__)[:2])
    first = min(alone, key=alone.__getitem__)
    pairs = {layer: nll((first, layer)) for layer in range(6) if layer != first}
    greedy = planned("greedy-perplexity")
    assert greedy.removed == (first, min(pairs, key=pairs.__getitem__))
    swept = planned("simdiff-masd-swept")
    sets = {i.removed for i in alpha_intervals(LayerScores.load(scores), "simdiff-masd", 2)}
    best = min(sets, key=nll)
    assert nll(tuple(sorted(swept.removed))) == pytest.approx(nll(best))
    assert swept.criterion == "simdiff-masd"
    assert swept.alpha is not None


def test_an_interrupted_search_goes_on(
    tiny_checkpoint: Path, scores: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plan.json"
    command = (
        "plan",
        scores,
        "--criterion",
        "greedy-perplexity",
        "--num-layers",
        3,
        "--model",
        tiny_checkpoint,
        "-o",
    )
    calls = itertools.count(1)
    plain = BypassEvaluator.losses

    def interrupted(self: BypassEvaluator, removed: frozenset[int]) -> list[float]:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return plain(self, removed)

    with monkeypatch.context() as patch:
        patch.setattr(BypassEvaluator, "losses", interrupted)
        assert simdiff(*command, out) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert not out.exists()
    journal = tmp_path / "plan.json.search.json"
    assert len(json.loads(journal.read_text())["evaluations"]) == 7

    calls = itertools.count(1000)
    with monkeypatch.context() as patch:
        patch.setattr(BypassEvaluator, "losses", interrupted)
        assert simdiff(*command, out) == 0
    assert next(calls) == 1000 + (6 + 5 + 4) - 7
    assert not journal.exists()
    assert simdiff(*command, tmp_path / "whole.json") == 0
    resumed, whole = PruningPlan.load(out), PruningPlan.load(tmp_path / "whole.json")
    assert resumed.removed == whole.removed
    assert resumed.importance == whole.importance


def test_run_with_a_search_and_the_card_that_repeats_it(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = (
        "run",
        tiny_checkpoint,
        "--text",
        tiny_text,
        *SMALL,
        "--criterion",
        "greedy-perplexity",
        "--num-layers",
        2,
        "--evaluation-windows",
        2,
    )
    assert simdiff(*command, "-o", out) == 0
    assert not list(tmp_path.glob("*.search.json"))
    card = (out / "model" / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("simdiff plan"))
    parser().parse_args(shlex.split(line)[1:])
    assert f"--model {tiny_checkpoint} --evaluation-windows 2" in line
    assert load_model(str(out / "model"))[0].config.num_hidden_layers == 4


@pytest.mark.parametrize("criterion", SEARCHED)
@pytest.mark.parametrize("more", [(), ("--evaluation-windows", 0)])
def test_a_search_needs_the_model(
    scores: Path, tiny_checkpoint: Path, tmp_path: Path, capsys, criterion: str, more: tuple
) -> None:
    model = ("--model", tiny_checkpoint) if more else ()
    out = tmp_path / "plan.json"
    command = ("plan", scores, "--criterion", criterion, "--num-layers", 2, *model, *more)
    assert simdiff(*command, "-o", out) == 2
    assert "give the model of the scores too (--model)" in capsys.readouterr().err
    assert simdiff(*command, "--selection", "blocks", "-o", out) == 2
    assert not out.exists()
