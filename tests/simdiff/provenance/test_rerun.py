"""What differs between two outputs of one command; `tests/simdiff/cli` repeats commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.provenance.rerun import command_of, compared

PLAN = {
    "created": "2026-01-01",
    "versions": {"torch": "2.10"},
    "model": {"fingerprint": "ab"},
    "calibration": {"sha256": "cd"},
    "removed": [3, 4],
}
RESULTS = {"dense": {"nll": 2.0, "speed": {"seconds": [1.0]}}, "seconds": 3.0}


def output(folder: Path, weights: bytes = b"w", **changed: object) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(PLAN | changed))
    (folder / "results.json").write_text(json.dumps(RESULTS | {"seconds": len(folder.name)}))
    (folder / "model" / "model.safetensors").write_bytes(weights)
    return folder


def test_equal_outputs_differ_in_times_alone(tmp_path: Path) -> None:
    found = compared(
        output(tmp_path / "a"), output(tmp_path / "bc", created="2027-02-02", notes=["a"])
    )
    assert found.same
    assert not found.circumstances
    assert found.lines() == [
        "Versions, machine, text and model are as they were.",
        "Every plan, number and weight is the same.",
    ]


def test_circumstances_are_told_apart_from_results(tmp_path: Path) -> None:
    other = output(
        tmp_path / "b",
        b"x",
        versions={"torch": "2.11"},
        model={"fingerprint": "ac"},
        calibration={"sha256": "ce"},
        removed=[3, 5],
        importance=[[1.0, 2.0], [4.0]],
    )
    found = compared(output(tmp_path / "a", importance=[[1.0, 2.0], [4.2]]), other)
    assert found.circumstances == {
        "the version (versions.torch)": "2.10 then, 2.11 now",
        "the model (model.fingerprint)": "ab then, ac now",
        "the text (calibration.sha256)": "cd then, ce now",
    }
    assert found.results == {
        "plan.json, removed": "[3, 4] then, [3, 5] now",
        "plan.json, importance": "1 of 3 numbers, by at most 4.8 %",
        "model/model.safetensors": "other weights",
    }
    assert "Result differs: plan.json, removed: [3, 4] then, [3, 5] now" in found.lines()


def test_a_file_of_one_alone(tmp_path: Path) -> None:
    one, other = output(tmp_path / "a"), output(tmp_path / "b")
    (other / "results.json").unlink()
    (other / "model" / "model.safetensors").unlink()
    assert list(compared(one, other).results) == ["results.json", "model/model.safetensors"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "must hold the config.yaml that run, prune, recover, compare write"),
        ("command: plan\n", "must name its command, one of .*, got 'plan'"),
        ("- a\n", "must name its command, .* got None"),
        ("a: [", "but is not"),
    ],
)
def test_directories_that_repeat_nothing(tmp_path: Path, content: str | None, wanted: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(SimdiffError, match=wanted):
        command_of(tmp_path)
