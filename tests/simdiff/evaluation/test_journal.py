"""Journals of evaluations: those of another run and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from support.cuts import journal


def test_foreign_journals_are_refused(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "evaluations.json"
    with journal(llama, windows, path)[1] as evaluate:
        evaluate((1,))
    content = path.read_text()
    other = windows.clone()
    other[2, 11] += 1
    with pytest.raises(SimdiffError, match="of another run, which differs in tokens; remove it"):
        journal(llama, other, path)
    with torch.no_grad():  # fine-tuned: same names, same shapes
        llama.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(SimdiffError, match="differs in weights;"):
        journal(llama, windows, path)
    with pytest.raises(SimdiffError, match="differs in weights, dtype;"):
        journal(llama.bfloat16(), windows, path)
    assert path.read_text() == content
    for damage in (content[:-40], content.replace('"losses": [', '"losses": ["x", ')):
        path.write_text(damage)
        with pytest.raises(SimdiffError, match="not JSON|differs in weights|damaged"):
            journal(llama, windows, path)


def test_damaged_entries_are_refused(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "evaluations.json"
    with journal(llama, windows, path)[1] as evaluate:
        evaluate((1,))
    content = json.loads(path.read_text())
    for change in ({"losses": []}, {"losses": ["x"]}, {"removed": None}, {"seconds": None}):
        entry = {**content["evaluations"][0], **change}
        path.write_text(json.dumps({**content, "evaluations": [entry]}))
        with pytest.raises(SimdiffError, match="finished evaluations, but is damaged"):
            journal(llama, windows, path)
