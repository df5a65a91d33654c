"""What trackers are told of a run, a comparison and a recovery: the real commands, one stand-in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import simdiff as simdiff_package
from simdiff.io import trackers
from simdiff.io.trackers import Tracker
from simdiff.planning.budget import Budget
from support.commands import SMALL, simdiff


class Seen:
    """Everything that one tracker was told."""

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int | None]] = []
        self.tables: dict[str, tuple[Sequence[str], list[Sequence[Any]]]] = {}
        self.files: dict[str, bytes] = {}
        self.config: Mapping[str, Any] = {}
        self.ends: list[bool] = []

    def start(self, name: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
        self.config = config

        def table(name: str, columns: Sequence[str], rows: Any) -> None:
            self.tables[name] = (columns, list(rows))

        return Tracker(
            metrics=lambda values, step: self.metrics.append((dict(values), step)),
            table=table,
            file=lambda path: self.files.update({path.name: path.read_bytes()}),
            close=self.ends.append,
        )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", seen.start)
    return seen


def test_a_run(seen: Seen, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("run", tiny_checkpoint, "--text", tiny_text, *SMALL, "--num-layers", 2, "-o", out)
    assert simdiff(*words, "--log", "wandb") == 0
    results = json.loads((out / "results.json").read_text())
    removed = json.loads((out / "plan.json").read_text())["removed"]
    columns, rows = seen.tables["layers"]
    assert [row[0] for row in rows if row[1]] == sorted(removed)
    assert len(columns) == len(rows[0]) == 5
    assert seen.tables["plan"][1] == [(1, removed[0]), (2, removed[1])]
    known = {key: value for values, _ in seen.metrics for key, value in values.items()}
    assert known["pruned/perplexity"] == results["pruned"]["perplexity"]
    assert known["num_removed"] == 2
    assert seen.files["report.html"] == (out / "report.html").read_bytes()
    assert seen.config["num_layers"] == 2
    assert seen.ends == [False]
    assert "log" not in (out / "config.yaml").read_text()


def test_a_comparison(seen: Seen, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, "--num-layers", "1,2")
    assert simdiff(*words, "--criteria", "last-n,random", "-o", out, "--log", "wandb") == 0
    cells = json.loads((out / "compare.json").read_text())["cells"]
    assert [row[3] for row in seen.tables["comparison"][1]] == [
        cell["quality"]["perplexity"] for cell in cells
    ]
    assert ({"perplexity/last-n": cells[0]["quality"]["perplexity"]}, 1) in seen.metrics
    assert set(seen.files) == {"compare.html", "compare.csv", "compare.json"}


def test_a_recovery(seen: Seen, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out"
    words = ("recover", tiny_checkpoint, "--remove", 2, "--text", tiny_text, *SMALL, "-o", out)
    training = ("--method", "lora", "--steps", 2, "--start", "cut", "--train-length", 16)
    assert simdiff(*words, *training, "--log", "wandb") == 0
    losses = [json.loads(line) for line in (tmp_path / "out.losses.jsonl").open()]
    assert [line["loss"] for line in losses if "loss" in line] == [
        values["train/loss"] for values, _ in seen.metrics if "train/loss" in values
    ]
    known = {key: value for values, _ in seen.metrics for key, value in values.items()}
    record = json.loads((out / "recovery.json").read_text())
    assert known["recovered/perplexity"] == record["quality"]["recovered"]["perplexity"]
    assert set(seen.files) == {"recovery.json", "plan.json", "README.md"}


def test_an_input_that_cannot_be_used(
    seen: Seen, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    assert simdiff("run", tmp_path, "--text", tmp_path, "-o", tmp_path, "--log", "wandb") == 2
    assert seen.ends == []  # refused before a tracker is told of it
    words = ("run", tiny_checkpoint, "--text", tiny_text, "-o", tmp_path / "out", "--log", "wandb")
    assert simdiff(*words, "--window-length", "100000") == 2
    assert seen.ends == [True]
    assert simdiff("run", tmp_path, "--text", tmp_path, "-o", tmp_path, "--log", "other") == 2


def test_from_python(seen: Seen, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    """`log` of the functions is `--log` of the commands."""
    text = simdiff_package.TextOptions(str(tiny_text), 4, 16)
    out, repaired = tmp_path / "out", tmp_path / "repaired"
    run = simdiff_package.run(
        str(tiny_checkpoint),
        out,
        text=text,
        plan=simdiff_package.PlanOptions(budget=Budget(2)),
        speed_rounds=0,
        log=["wandb"],
    )
    assert seen.tables["plan"][1][0] == (1, run.plan.removed[0])
    assert seen.files["report.html"] == (out / "report.html").read_bytes()
    assert (seen.config["command"], seen.config["num_windows"]) == ("run", 4)
    seen.files.clear()
    documents = simdiff_package.TextOptions(tiny_text.read_text().split("\n\n"), 4, 16)
    record = simdiff_package.recover(
        tiny_checkpoint, [2], repaired, documents, log=["wandb"], norm_power=1.0
    )
    known = {key: value for values, _ in seen.metrics for key, value in values.items()}
    assert known["recovered/perplexity"] == record.perplexity("recovered")
    assert set(seen.files) == {"recovery.json", "plan.json", "README.md"}
    assert (seen.config["method"], seen.config["norm_power"]) == ("closed-form", 1.0)
    assert str(seen.config["source"]).startswith("documents in memory, sha256 ")
    assert seen.ends == [False, False]
    with pytest.raises(simdiff_package.SimdiffError, match="must be of trackio, wandb"):
        simdiff_package.recover(tiny_checkpoint, [2], tmp_path / "x", text, log=["other"])
