"""Files of scores: written and read again, of earlier versions, damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.planning.bootstrap import bootstrap_plan
from simdiff.planning.criteria import importance
from simdiff.planning.draws import draws, resampled
from simdiff.planning.make_plan import make_plan
from simdiff.scoring.block_scores import BlockScores, block_scores_of
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import METRICS, RunningBlockScores
from support.states import unlike_sequences


@pytest.fixture
def ids() -> torch.Tensor:
    return unlike_sequences()


def test_scores_file_round_trip(llama_scores: LayerScores, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    llama_scores.save(path)
    assert LayerScores.load(path) == llama_scores
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


def damaged_scores(content: dict) -> dict[str, tuple[object, str]]:
    metric = content["metrics"]["cosine_distance"]
    without = {
        **content,
        "metrics": {k: v for k, v in content["metrics"].items() if k != METRICS[0]},
    }
    short = {**metric, "mean": metric["mean"][:-1]}
    text = {**metric, "mean": ["low"] * 6}
    return {
        "newer": (
            {**content, "schema_version": 5},
            "schema_version 1 to 4, got 5; a newer simdiff",
        ),
        "no version": ({**content, "schema_version": None}, "schema_version 1 to 4, got None"),
        "a plan": (
            {**content, "schema": "simdiff.plan"},
            "be a simdiff.scores file.*'simdiff.plan'",
        ),
        "a list": ([content], "got schema 'list'"),
        "no metric": (without, "damaged.*cosine_distance"),
        "short": ({**content, "metrics": {**content["metrics"], METRICS[0]: short}}, "6 entries"),
        "words": ({**content, "metrics": {**content["metrics"], METRICS[0]: text}}, "damaged"),
    }


def test_damaged_scores_are_refused(llama_scores: LayerScores, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    for content, wanted in damaged_scores(llama_scores.to_dict()).values():
        path.write_text(json.dumps(content))
        with pytest.raises(SimdiffError, match=wanted):
            LayerScores.load(path)
    path.write_text(json.dumps(llama_scores.to_dict())[:200])
    with pytest.raises(SimdiffError, match="is not JSON"):
        LayerScores.load(path)
    path.write_text(
        json.dumps(llama_scores.to_dict()).replace(
            repr(llama_scores.metrics[METRICS[0]].mean[0]), "NaN", 1
        )
    )
    with pytest.raises(SimdiffError, match="numbers must be finite, got NaN"):
        LayerScores.load(path)
    with pytest.raises(SimdiffError, match="No such file"):
        LayerScores.load(tmp_path / "none.json")


def test_scores_without_blocks_say_what_to_run(llama_scores: LayerScores, tmp_path: Path) -> None:
    content = {**llama_scores.to_dict(), "schema_version": 1}
    del content["blocks"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = LayerScores.load(tmp_path / "old.json")
    assert old.blocks is None
    with pytest.raises(SimdiffError, match="lack: score the model again with `simdiff score`"):
        make_plan(old, 2)
    assert make_plan(old, 2, criterion="block-influence").selection == "lowest"
    for rows in ([[1.0]], [[1.0] * 6] * 6, "none"):
        damaged = llama_scores.to_dict()
        damaged["blocks"]["norm_change"] = rows
        (tmp_path / "old.json").write_text(json.dumps(damaged))
        with pytest.raises(SimdiffError, match="norm_change of blocks must have 6 rows"):
            LayerScores.load(tmp_path / "old.json")


def test_scores_of_older_versions(llama_scores: LayerScores, tmp_path: Path) -> None:
    """Version 2 had blocks without angles: all but their criterion, which says what to run."""
    content = llama_scores.to_dict()
    assert content["schema_version"] == 4
    del content["blocks"]["angular_distance"]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="damaged: KeyError: 'angular_distance'"):
        LayerScores.load(path)
    path.write_text(json.dumps({**content, "schema_version": 2}))
    scores = LayerScores.load(path)
    assert make_plan(scores, 2) == make_plan(llama_scores, 2)
    assert make_plan(scores, 2, criterion="cosine-block").criterion == "cosine-block"
    wanted = "angular-distance needs the angular_distance of all blocks.*`simdiff score`"
    for use in (
        lambda: make_plan(scores, 2, criterion="angular-block"),
        lambda: importance(scores, "angular-block"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            use()
    scores.save(tmp_path / "again.json")
    assert LayerScores.load(tmp_path / "again.json") == scores


def test_the_absolute_difference_of_blocks_is_kept_where_it_is(
    llama_scores: LayerScores, tmp_path: Path
) -> None:
    """Files up to version 3 have it, later ones where it was asked for; nothing depends on it."""
    assert llama_scores.blocks is not None
    assert "absolute_difference" not in llama_scores.blocks.metrics
    assert llama_scores.to_dict()["blocks"]["absolute_difference"] is None
    running = RunningBlockScores(6, absolute_difference=True)
    running.update([torch.randn(9, 16) for _ in range(7)])
    blocks = block_scores_of(running.finish(), torch.rand(7, 7).triu(1))
    assert blocks.metrics["absolute_difference"][2][5] > 0
    path = tmp_path / "scores.json"
    for version in (3, 4):
        content = dataclasses.replace(llama_scores, blocks=blocks).to_dict()
        path.write_text(json.dumps(content | {"schema_version": version}))
        scores = LayerScores.load(path)
        assert scores.blocks == blocks
        without = {k: v for k, v in blocks.metrics.items() if k != "absolute_difference"}
        same = dataclasses.replace(scores, blocks=BlockScores(without))
        for criterion in ("simdiff", "cosine-block", "simdiff-masd"):
            assert make_plan(scores, 2, criterion=criterion) == make_plan(
                same, 2, criterion=criterion
            )


def test_files_and_their_earlier_versions(llama_scores: LayerScores, tmp_path: Path) -> None:
    """Saved and loaded, scores give the same frequencies; version 2 gives none, and says so."""
    path = tmp_path / "scores.json"
    llama_scores.save(path)
    loaded = LayerScores.load(path)
    assert loaded == llama_scores

    def found(scores: LayerScores) -> object:
        return bootstrap_plan(scores, lambda given: make_plan(given, 3), num_resamples=50)

    assert found(loaded) == found(llama_scores)
    assert found(loaded) is not None
    content = json.loads(path.read_text())
    old = {k: v for k, v in content.items() if k not in ("sequences", "leading", "stability")}
    for table in old["metrics"].values():
        del table["cluster_standard_error"]
    path.write_text(json.dumps(old | {"schema_version": 2}))
    earlier = LayerScores.load(path)
    assert earlier.sequences is None
    assert earlier.metrics["cosine_distance"].error == earlier.metrics[METRICS[0]].standard_error
    assert found(earlier) is None
    assert make_plan(earlier, 3).removed == make_plan(llama_scores, 3).removed
    with pytest.raises(SimdiffError, match="score the model again"):
        next(resampled(earlier, draws(5, 1)))


def test_damaged_stability(llama_scores: LayerScores, tmp_path: Path) -> None:
    for bad in ("stable", {"stable": True}):
        (tmp_path / "s.json").write_text(json.dumps(llama_scores.to_dict() | {"stability": bad}))
        with pytest.raises(SimdiffError, match="damaged"):
            LayerScores.load(tmp_path / "s.json")


def test_leading_tokens_in_the_file(llama: PreTrainedModel, ids: torch.Tensor, tmp_path) -> None:
    scores = score(llama, [ids], progress=False, skip_leading=1)
    scores.save(tmp_path / "s.json")
    assert LayerScores.load(tmp_path / "s.json") == scores
    assert scores.calibration["skip_leading"] == 1
    content = scores.to_dict()
    del content["leading"]["metrics"]["norm_after"]
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="norm_after"):
        LayerScores.load(tmp_path / "s.json")
