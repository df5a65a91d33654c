"""The file of losses: one line a step and an evaluation, none twice after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.loop import fine_tune
from simdiff.recovery.training.losses import LossLog
from simdiff.recovery.training.step import Student
from simdiff.surgery.copies import sharing_copy
from support.training import SMALL


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_training_writes_what_an_uninterrupted_one_does(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[dict[str, float], int]] = []

    def train(path: Path) -> Any:
        log = LossLog(path, lambda values, step: told.append((dict(values), step)))
        pruned = sharing_copy(dense, (2, 3))
        directory = path.with_suffix(".training")
        return fine_tune(
            pruned, *text, SMALL, teacher=dense, directory=directory, progress=False, losses=log
        )

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    result = train(whole)
    found = lines(whole)
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["set_apart_loss"] for line in found if "set_apart_loss" in line] == [
        point["set_apart_loss"] for point in result.curve
    ]
    assert told[0] == ({"train/set_apart_loss": result.curve[0]["set_apart_loss"]}, 0)
    assert told[1][0]["train/loss"] == steps[0]["loss"]

    real, calls = Student.step, []

    def stops(self: Student, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, *arguments)

    part.write_text("of an earlier training\n")
    monkeypatch.setattr(Student, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(part)
    assert len(lines(part)) == 7
    part.write_text(part.read_text() + '{"step": 6, "lo')
    train(part)
    assert lines(part) == found
