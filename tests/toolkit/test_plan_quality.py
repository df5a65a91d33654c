"""The benchmark of plans: greedy search against brute force, and losses kept between runs."""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.evaluation import perplexity
from simdiff.surgery import removed_layers

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def plan_quality(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import plan_quality

    return plan_quality


def test_greedy_takes_the_best_layer_each_time(llama: PreTrainedModel, plan_quality) -> None:
    windows = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(2))
    losses = plan_quality.Losses(llama, {"calibration": windows}, "tiny", None)
    found = list(plan_quality.greedy(losses, 6, num_windows=2, count=3))

    def nll(removed: tuple[int, ...]) -> float:
        with removed_layers(llama, removed):
            return perplexity(llama, windows[:2]).nll

    removed: tuple[int, ...] = ()
    for step in found:
        removed = min(((*removed, k) for k in range(6) if k not in removed), key=nll)
        assert step == removed
    assert losses.reads == 2 * (6 + 5 + 4)
    llama.model.layers[2].mlp.down_proj.weight.data.fill_(torch.nan)
    spoiled = plan_quality.Losses(llama, {"calibration": windows}, "tiny", None)
    for plan in itertools.combinations(range(6), 2):
        assert (spoiled.nll("calibration", plan, 2) == float("inf")) is (2 not in plan)


def test_a_second_run_takes_all_losses_from_the_file(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, plan_quality, monkeypatch
) -> None:
    def run(name: str, *more: str) -> list[dict[str, str]]:
        output = tmp_path / f"{name}.csv"
        options = (
            f"x {tiny_checkpoint} --text {tiny_text} --layers 2 3 --windows 4 --window-length 16 "
            f"--held-out-windows 2 --held-out-length 12 --greedy 1 --dtype float32 "
            f"--cache {tmp_path / 'losses.pt'} --output {output}"
        )
        monkeypatch.setattr(sys, "argv", [*options.split(), *more])
        with torch.inference_mode():
            plan_quality.main()
        with open(output, encoding="utf-8") as file:
            return list(csv.DictReader(file))

    first, second = run("first"), run("second")
    assert [{**row, "seconds": ""} for row in first] == [{**row, "seconds": ""} for row in second]
    assert all(row["seconds"] == "" for row in second if int(row["windows read"]))
    methods = {row["method"] for row in first if row["removed"] == "3"}
    assert {"simdiff", "block influence", "greedy perplexity search"} <= methods
    search = [row for row in first if row["method"] == "greedy perplexity search"]
    assert [(row["to greedy"], row["windows read"]) for row in search] == [
        ("1.000", "11"),
        ("1.000", "15"),
    ]
    order = search[0]["layers"].split()
    given = run("given", "--greedy-order", *order)
    rows = [row for row in given if row["method"] == "greedy perplexity search"]
    assert [(row["layers"], row["windows read"]) for row in rows] == [(search[0]["layers"], "0")]
    with pytest.raises(SystemExit, match="must hold losses of .*seed 1"):
        run("other", "--seed", "1")
