"""A criterion and a selection of a toy package, in every place where those of this one are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from simdiff.cli import parser
from simdiff.comparison.compare import ComparisonOptions
from simdiff.errors import SimdiffError
from simdiff.planning import entry_points
from simdiff.planning.criteria import check_criterion, importance
from simdiff.planning.make_plan import make_plan
from simdiff.planning.options import PlanOptions
from simdiff.scoring.scores import LayerScores
from support.commands import SMALL, simdiff

TOY = """
from simdiff import Criterion

MIDDLE = Criterion(
    "middle-out",
    "|layer - middle|",
    "a toy",
    importance=lambda scores, seed: [
        abs(layer - (scores.num_layers - 1) / 2) for layer in range(scores.num_layers)
    ],
    selection="every-other",
)
SHORT = Criterion("too-short", "1", "a toy", importance=lambda scores, seed: (1.0,))
OTHER_NAME = Criterion("b", "1", "a toy", importance=lambda scores, seed: (1.0,))

def every_other(scores, importance, num_remove, protect):
    order = sorted(range(scores.num_layers), key=importance.__getitem__)
    return [layer for layer in order if layer % 2 == 0 and layer not in protect][:num_remove]

def twice(scores, importance, num_remove, protect):
    return [1] * num_remove

def first(scores, importance, num_remove, protect):
    return range(num_remove)
"""
NAMES = """\
[simdiff.criteria]
middle-out = toy_criteria:MIDDLE
too-short = toy_criteria:SHORT
other-name = toy_criteria:OTHER_NAME
not-one = toy_criteria:every_other
broken = toy_criteria_absent:X
simdiff = toy_criteria:SHORT
not/a/file = toy_criteria:SHORT

[simdiff.selections]
every-other = toy_criteria:every_other
twice = toy_criteria:twice
first = toy_criteria:first
"""


def forget() -> None:
    entry_points._named.cache_clear()
    entry_points.loaded.cache_clear()
    sys.modules.pop("toy_criteria", None)


@pytest.fixture
def _toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    info = site / "toy_criteria-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "toy_criteria.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-criteria\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(NAMES)
    monkeypatch.syspath_prepend(str(site))
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.usefixtures("_toy")
def test_names_are_known_and_nothing_is_imported() -> None:
    known = entry_points.known_criteria()
    assert "middle-out" in known
    assert "not/a/file" not in known
    assert known.count("simdiff") == 1
    assert "middle-out" in ComparisonOptions(("middle-out",)).criteria
    words = ["plan", "s.json", "--criterion", "middle-out", "--selection", "every-other"]
    assert parser().parse_args([*words, "-o", "p"]).criterion == "middle-out"
    assert "middle-out" in parser().parse_args(["compare", "m", "-o", "p"]).criteria
    assert "toy_criteria" not in sys.modules


@pytest.mark.usefixtures("_toy")
def test_a_plan(llama_scores: LayerScores) -> None:
    assert importance(llama_scores, "middle-out").values == (2.5, 1.5, 0.5, 0.5, 1.5, 2.5)
    plan = make_plan(llama_scores, 2, criterion="middle-out")
    assert (plan.removed, plan.selection) == ((2, 4), "every-other")
    plan = make_plan(llama_scores, 2, criterion="middle-out", selection="lowest")
    assert set(plan.removed) == {2, 3}
    plan = make_plan(llama_scores, 2, criterion="simdiff", selection="every-other", protect=[0])
    assert set(plan.removed) == {2, 4}
    assert make_plan(llama_scores, 2, criterion="simdiff").selection.startswith("optimal blocks")
    options = PlanOptions(criterion="simdiff", selection="every-other", bootstrap=9)
    assert options.of_scores.of_draws(llama_scores, np.ones((2, 5), np.int64)) is None
    plan = options.plan(llama_scores)
    assert plan.confidence is not None
    assert plan.selection == "every-other"


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("unheard", "must be one of simdiff, .*middle-out.*got 'unheard'"),
        ("other-name", "must bear this name .* got 'b'"),
        ("not-one", r"toy-criteria 1\.5 .*must be a simdiff.*Criterion, got function"),
        ("broken", r"broken of toy-criteria 1\.5 \(.*\) cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_is_no_criterion(name: str, wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted):
        check_criterion(name, 0.5)


@pytest.mark.usefixtures("_toy")
def test_what_they_give_is_checked(llama_scores: LayerScores) -> None:
    with pytest.raises(SimdiffError, match="too-short: must give a number for each of 6 layers"):
        importance(llama_scores, "too-short")
    with pytest.raises(SimdiffError, match=r"every-other: must give 4 different layers of 6 .*got"):
        make_plan(llama_scores, 4, criterion="middle-out")
    with pytest.raises(SimdiffError, match=r"twice: must give 2 different layers .*got \(1, 1\)"):
        make_plan(llama_scores, 2, selection="twice")
    with pytest.raises(SimdiffError, match=r"first: .* that are not protected, got \(0, 1\)"):
        make_plan(llama_scores, 2, selection="first", protect=[1])
    with pytest.raises(SimdiffError, match="'contiguous' needs the costs of blocks"):
        make_plan(llama_scores, 2, criterion="middle-out", selection="contiguous")


@pytest.mark.usefixtures("_toy")
def test_the_commands(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, "--num-layers", 2)
    assert simdiff(*words, "--criteria", "middle-out,last-n", "-o", out) == 0
    cells = json.loads((out / "compare.json").read_text())["cells"]
    assert cells[0]["criterion"] == "middle-out"
    assert cells[0]["removed"] == [2, 4]
    assert "|layer - middle|" in (out / "compare.html").read_text()
    plan = tmp_path / "plan.json"
    assert simdiff("plan", out / "scores.json", "--criterion", "middle-out", "-o", plan) == 0
    assert json.loads(plan.read_text())["removed"] == [2]
