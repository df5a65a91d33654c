"""A comparison from start to end: its files, its numbers, interruption and bad input."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simdiff.comparison.compare import ComparisonOptions, remove_journal
from simdiff.comparison.plans import CellJournal, Planner
from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import window_losses
from simdiff.planning.names import ALL_CRITERIA
from simdiff.planning.plan import PruningPlan
from simdiff.surgery.layers import layers_removed
from support.browser import look_at, needs_chromium
from support.commands import simdiff
from support.pages import References

SMALL = (
    "--num-windows",
    "4",
    "--window-length",
    "16",
    "--num-layers",
    "2,4",
    "--evaluation-windows",
    "2",
)


def test_every_criterion(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert simdiff("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, "-o", out) == 0
    printed = capsys.readouterr().out
    assert sorted(entry.name for entry in out.iterdir()) == [
        "compare.csv",
        "compare.html",
        "compare.json",
        "config.yaml",
        "plans",
        "scores.json",
    ]
    assert not out.with_name("out.journal").exists()
    content = json.loads((out / "compare.json").read_text())
    cells = {(cell["criterion"], cell["num_removed"]): cell for cell in content["cells"]}
    assert list(cells) == [(name, count) for count in (2, 4) for name in ALL_CRITERIA]
    rows = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    assert len(rows) == len(cells)

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    held_out = token_windows(
        str(tiny_text),
        AutoTokenizer.from_pretrained(tiny_checkpoint),
        part="held-out",
        num_windows=4,
        window_length=16,
    ).tokens
    dense = window_losses(model, held_out, description=None)
    assert content["dense"]["perplexity"] == pytest.approx(math.exp(sum(dense) / 4))
    for row in rows:
        cell = cells[row["criterion"], int(row["num_removed"])]
        removed = [int(layer) for layer in row["removed"].split()]
        assert removed == cell["removed"]
        plan = PruningPlan.load(out / cell["plan"])
        assert sorted(plan.removed) == removed
        assert len(removed) == int(row["num_removed"])
        notes = " ".join(plan.notes)
        looked = row["criterion"].endswith(("swept", "perplexity"))
        assert ("evaluated on the first 2 windows" in notes) == looked
        assert ("what greedy search by perplexity runs on 2 windows" in notes) == (
            row["criterion"] == "simdiff"
        )
        with layers_removed(model, removed):
            losses = window_losses(model, held_out, description=None)
        assert float(row["perplexity"]) == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
        assert float(row["ratio"]) == pytest.approx(
            float(row["perplexity"]) / content["dense"]["perplexity"], rel=1e-5
        )
        assert float(row["perplexity_low"]) <= float(row["perplexity"])
        assert float(row["seconds_to_plan"]) > 0
        assert row["problem"] == ""
    # Searches see calibration text alone: the greedy plan is the plain search's there.
    greedy = cells["greedy-perplexity", 4]
    assert set(cells["greedy-perplexity", 2]["removed"]) < set(greedy["removed"])
    assert greedy["seconds_to_plan"] > cells["one-shot-perplexity", 4]["seconds_to_plan"]
    assert cells["simdiff-masd-swept", 2]["sweep"]["num_sets"] >= 1
    for text in ("greedy-perplexity", "to plan", str(out / "compare.html")):
        assert text in printed
    page = References()
    page.feed((out / "compare.html").read_text())
    assert len(page.alternatives) == 5  # perplexity, layers at 2 and 4, two of all blocks
    assert all(page.alternatives)
    assert all(url.startswith("data:") for url in page.urls)


@needs_chromium
def test_the_page_fits_a_phone(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert simdiff("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, "-o", out) == 0
    found = look_at((out / "compare.html").read_text(), 360, tmp_path)
    assert (found["console"], found["wide"], found["scroll"]) == ([], [], 360)


def test_a_plan_of_the_comparison_prunes(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    out, small = tmp_path / "out", tmp_path / "small"
    text = ("--text", tiny_text, *SMALL, "--criteria", "greedy-perplexity,last-n")
    assert simdiff("compare", tiny_checkpoint, *text, "-o", out) == 0
    plan = out / "plans" / "greedy-perplexity-2.json"
    assert simdiff("prune", tiny_checkpoint, "--plan", plan, "-o", small) == 0
    assert AutoModelForCausalLM.from_pretrained(small).config.num_hidden_layers == 4
    assert simdiff("compare", tiny_checkpoint, *text, "-o", out) == 2
    assert simdiff("compare", tiny_checkpoint, *text, "-o", out, "--overwrite", "--json") == 0


@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_an_interrupted_comparison_goes_on(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.journal"
    names = "block-influence,simdiff-masd-swept,one-shot-perplexity,greedy-perplexity"
    command = ("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, "--criteria", names)
    assert simdiff(*command, "-o", tmp_path / "whole") == 0
    planned = []
    plain = Planner.cell

    def interrupted(self: Planner, criterion: str, count: int):
        planned.append((criterion, count))
        if len(planned) == stop_at:
            raise KeyboardInterrupt
        return plain(self, criterion, count)

    def losses(*arguments: object, **keywords: object) -> list[float]:
        raise KeyboardInterrupt  # after all eight cells: while the first plan is measured

    with monkeypatch.context() as patch:
        patch.setattr(Planner, "cell", interrupted)
        patch.setattr("simdiff.comparison.compare.window_losses", losses)
        assert simdiff(*command, "-o", out) == 130
    assert "same command again" in capsys.readouterr().err
    assert not out.exists()
    assert (journal / "scoring.json").exists()
    already = min(stop_at - 1, 8)
    if already:
        assert len(json.loads((journal / "cells.json").read_text())["cells"]) == already

    stop_at, planned = 99, []
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "cell", interrupted)
        patch.setattr(
            "simdiff.comparison.compare.score", lambda *a, **k: pytest.fail("scored again")
        )
        assert simdiff(*command, "-o", out) == 0
    assert len(planned) == 8 - already
    assert not journal.exists()
    first, second = (
        [
            (cell["criterion"], cell["num_removed"], cell["removed"], cell["quality"])
            for cell in json.loads((folder / "compare.json").read_text())["cells"]
        ]
        for folder in (tmp_path / "whole", out)
    )
    assert first == second


def test_a_journal_of_other_input_is_refused(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("compare", tiny_checkpoint, "--text", tiny_text, *SMALL)
    command += ("--criteria", "last-n,simdiff-masd")
    with monkeypatch.context() as patch:
        patch.setattr(
            "simdiff.comparison.compare.window_losses",
            lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert simdiff(*command, "-o", tmp_path / "out") == 130
    for change, wanted in (
        (
            ("--num-windows", "3"),
            "differs in text.num_windows, text.num_tokens, text.tokens_sha256, tokens",
        ),
        (("--alpha", "0.1"), "differs in alpha"),
        (("--protect", "1"), "differs in protect"),
        (("--dtype", "bfloat16"), "differs in weights, dtype"),
        (("--batch-size", "2"), "differs in batch_size"),
    ):
        capsys.readouterr()
        assert simdiff(*command, *change, "-o", tmp_path / "out") == 2
        assert wanted in capsys.readouterr().err
    descriptor = os.open(tmp_path / "out.journal", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert simdiff(*command, "-o", tmp_path / "out") == 2
    assert "one comparison at a time" in capsys.readouterr().err
    os.close(descriptor)
    restarted = (*command, "--alpha", "0.1", "--restart", "-o", tmp_path / "out")
    assert simdiff(*restarted) == 0
    foreign = tmp_path / "mine.journal"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(SimdiffError, match="other files"):
        remove_journal(foreign)
    assert (foreign / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--criteria", "taylor,last-n"), "there is no criterion 'taylor'"),
        (("--alpha", "1.5"), "alpha must be in [0, 1], got 1.5"),
        (("--alpha", "nan"), "alpha must be in [0, 1], got nan"),
        (("--num-layers", "2,6"), "1 to 5 of 6, got 6"),
        (("--num-layers", "0"), "1 to 5 of 6, got 0"),
        (("--protect", "0-3", "--num-layers", "3"), "3 layers must be free to remove, got 2"),
        (("--evaluation-windows", "-1"), "windows must be at least 0, got -1"),
    ],
)
def test_bad_input(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys, arguments: tuple, wanted: str
) -> None:
    command = ("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, *arguments)
    before = sorted(tmp_path.rglob("*"))
    assert simdiff(*command, "-o", tmp_path / "out") == 2
    message = capsys.readouterr().err
    for part in wanted.split(".*"):
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_planned_or_measured_is_a_row_that_says_so(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    names = "cosine-block,last-n"
    command = ("--text", tiny_text, *SMALL, "--criteria", names, "--protect", "2")
    assert simdiff("compare", tiny_checkpoint, *command, "-o", tmp_path / "out") == 0
    cells = json.loads((tmp_path / "out" / "compare.json").read_text())["cells"]
    found = {(cell["criterion"], cell["num_removed"]): cell for cell in cells}
    # Layer 2 divides six layers into two and three: no block of four is free.
    assert "leave no such choice" in found["cosine-block", 4]["problem"]
    assert found["cosine-block", 4]["quality"] is None
    assert found["cosine-block", 2]["quality"] is not None
    assert found["last-n", 4]["removed"] == [1, 3, 4, 5]
    assert "leave no such choice" in (tmp_path / "out" / "compare.html").read_text()


def test_a_pruned_model_without_a_finite_perplexity(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflowing(model, windows: torch.Tensor, **keywords: object) -> list[float]:
        losses = window_losses(model, windows, **keywords)
        return [math.inf] * len(losses) if model.config.num_hidden_layers == 2 else losses

    monkeypatch.setattr("simdiff.comparison.compare.window_losses", overflowing)
    command = ("--text", tiny_text, *SMALL, "--criteria", "last-n,random")
    assert simdiff("compare", tiny_checkpoint, *command, "-o", tmp_path / "out") == 0
    assert "none" in capsys.readouterr().out
    for row in csv.DictReader(io.StringIO((tmp_path / "out" / "compare.csv").read_text())):
        broken = row["num_removed"] == "4"
        assert (row["problem"] == "the held-out perplexity is NaN or Inf") == broken
        assert (row["perplexity"] == "") == broken


def test_default_steps() -> None:
    assert ComparisonOptions().counts(30) == (2, 4, 6, 8, 10, 12)
    assert ComparisonOptions().counts(80) == (5, 11, 16, 21, 27, 32)
    assert ComparisonOptions().counts(4) == (1, 2)
    assert ComparisonOptions(num_layers=(5, 2, 5)).counts(30) == (2, 5)


def test_damaged_cells_are_refused(tmp_path: Path) -> None:
    journal = CellJournal(tmp_path, {"a": 1})
    path = tmp_path / "cells.json"
    content = {"schema": "simdiff.comparison-cells", "schema_version": 1, "key": {"a": 1}}
    for cells in (None, [{"criterion": "last-n"}], [7]):
        path.write_text(json.dumps({**content, "cells": cells}))
        with pytest.raises(SimdiffError, match="finished cells, but is damaged"):
            CellJournal(tmp_path, {"a": 1})
    assert journal.cells == {}
