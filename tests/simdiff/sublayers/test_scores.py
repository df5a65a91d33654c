"""Scores of sub-layers: their files, and that layers are scored as without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.plan import plan_sublayers
from simdiff.sublayers.scores import SublayerScores
from support.families import token_ids


def test_files_of_scores(scores: LayerScores, llama_scores: LayerScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "new.json")
    again = LayerScores.load(tmp_path / "new.json")
    assert SublayerScores.from_scores(again) == SublayerScores.from_scores(scores)
    llama_scores.save(tmp_path / "old.json")  # as before there were sub-layers
    assert "sublayers" not in json.loads((tmp_path / "old.json").read_text())
    old = LayerScores.load(tmp_path / "old.json")
    assert old == llama_scores
    with pytest.raises(SimdiffError, match="score the model again with `simdiff score --subl"):
        plan_sublayers(old, "mlp", 2)
    content = SublayerScores.from_scores(scores).to_dict()
    for damage in (
        {"norm_change": content["norm_change"][1:]},
        {"names": content["names"][2:]},
        {"names": [[0, "norm"], *content["names"][1:]]},
        {"metrics": {}},
    ):
        with pytest.raises(SimdiffError, match="of sub-layers must hold finite values.*damaged"):
            SublayerScores.from_scores(replace(scores, sublayers={**content, **damage}))


def test_layers_are_scored_as_without(scores: LayerScores, llama: PreTrainedModel) -> None:
    from simdiff.scoring.calibration_pass import score

    plain = score(llama, [token_ids()], name="tiny", progress=False)
    assert replace(scores, sublayers=None) == plain
