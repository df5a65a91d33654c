"""The scripts of benchmarks/ on a tiny model: what they write, against what is computed apart."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.calibration import token_windows
from simdiff.evaluation import perplexity
from simdiff.models import load_model
from simdiff.planning import make_plan
from simdiff.scores import score
from simdiff.surgery import removed_layers

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def main(script: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()

    return main


@pytest.fixture
def model(tiny_checkpoint: Path) -> PreTrainedModel:
    return load_model(str(tiny_checkpoint), device="cpu")[0]


def windows_of(model: Path, text: str, count: int, part: str = "calibration") -> torch.Tensor:
    tokenizer = load_model(str(model), device="cpu")[1]
    return token_windows(text, tokenizer, part=part, num_windows=count, window_length=16).tokens


def test_amount_of_calibration_text(
    run: Run, model: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Runs of 1, 2 and 4 windows, each against the plan of the other four."""
    output = tmp_path / "amount"
    run(
        "calibration_amount", tiny_checkpoint, "--text", tiny_text, "--dtype", "float32",
        "--layers", 2, 3, "--half", 4, "--window-length", 16, "--resamples", 10,
        "--output", output,
    )  # fmt: skip
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with open(output.with_suffix(".csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["windows"]) for row in rows]
    assert sizes == 2 * [1, 1, 1, 1, 2, 2, 4]
    windows = windows_of(tiny_checkpoint, str(tiny_text), 8)

    def plan(of: torch.Tensor, count: int) -> set[int]:
        return set(make_plan(score(model, [of], progress=False), count).removed)

    for row, size in zip(rows, sizes, strict=True):
        first, count = int(row["run"]) * size, int(row["removed"])
        removed = plan(windows[first : first + size], count)
        assert row["layers"] == " ".join(map(str, sorted(removed)))
        shared = len(removed & plan(windows[4:], count)) / count
        assert float(row["overlap"]) == pytest.approx(shared, abs=1e-4)
        assert (row["agreement"] == "") is (size == 1)


def test_recovery(
    run: Run, model: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "recovery.json"
    sizes = ("--windows", 6, "--held-out-windows", 4, "--window-length", 16)
    of = ("--model", tiny_checkpoint, "--text", tiny_text, "--dtype", "float32")
    run("recovery", *of, "--removed", "2-3", *sizes, "--output", output)
    (row,) = json.loads(output.read_text())["rows"]
    held_out = windows_of(tiny_checkpoint, str(tiny_text), 4, "held-out")
    found: dict[str, float] = row["perplexity"]
    assert found["dense"] == pytest.approx(perplexity(model, held_out).perplexity, rel=1e-5)
    with removed_layers(model, (2, 3)):
        assert found["pruned"] == pytest.approx(perplexity(model, held_out).perplexity, rel=1e-5)
    assert row["against_plain_cut"] == found["recovered"] / found["pruned"] - 1


@pytest.mark.model  # for its text
def test_sublayers(
    run: Run, model: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import sublayers

    monkeypatch.setattr(sublayers, "PLANS", (("attention", 2), ("mlp", 1)))
    output = tmp_path / "sublayers.json"
    sizes = ("--windows", 4, "--held-out-windows", 2, "--window-length", 16, "--repeats", 0)
    run("sublayers", tiny_checkpoint, *sizes, "--output", output)
    dense, *rows = json.loads(output.read_text())["quality"]
    held_out = windows_of(tiny_checkpoint, "demo", 2, "held-out")
    assert dense["perplexity"] == pytest.approx(perplexity(model, held_out).perplexity, rel=1e-5)
    units = [(row["unit"], row["removed"]) for row in rows]
    assert units == 2 * [("attention", 2), ("mlp", 1)]
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for row in rows:
        assert len(row["sublayers"]) == row["removed"]
        with torch.no_grad():  # a branch whose last map is zero adds nothing
            for unit, layer in (name.split() for name in row["sublayers"]):
                block = model.model.layers[int(layer)]
                last = block.self_attn.o_proj if unit == "attention" else block.mlp.down_proj
                last.weight.zero_()
        wanted = perplexity(model, held_out).perplexity
        assert row["perplexity"] == pytest.approx(wanted, rel=1e-5)
        model.load_state_dict(kept)


@pytest.mark.model  # for its text
def test_search(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It ends where states used again give other losses."""
    output = tmp_path / "search.json"
    sizes = ("--windows", 3, "--window-length", 16, "--dtype", "float32")
    run("search", "--model", tiny_checkpoint, *sizes, "--output", output)
    found = json.loads(output.read_text())
    assert (found["candidates"], found["windows"]) == (6, [3, 16])
    assert found["ratio"] == found["plain_seconds"] / found["reusing_seconds"]
