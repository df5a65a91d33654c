"""Files that a page is made of: damaged, of another model, of another cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from simdiff.errors import SimdiffError
from simdiff.io.json_files import header, write_json
from simdiff.planning.plan import PruningPlan
from simdiff.report.cells import quality_rows
from simdiff.report.sources import read_sources
from support.report_files import NAME, evaluation, recovery


def _spoil(content: dict[str, Any], way: list[str], value: Any) -> None:
    *outer, last = way
    for key in outer:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("kind", "way", "value", "message"),
    [
        ("evaluation", ["schema"], "simdiff.plan", "must be a simdiff.evaluation file, got schema"),
        ("evaluation", ["schema_version"], 9, "a newer simdiff wrote it"),
        ("evaluation", ["models"], None, "but is damaged: KeyError: 'models'"),
        ("evaluation", ["models"], {}, "models must hold one or more"),
        ("evaluation", ["models"], "", "but is damaged: TypeError: must be an object"),
        ("evaluation", ["models", "out/model", "perplexity"], "many", "but is damaged: TypeError"),
        (
            "evaluation",
            ["models", "out/model", "num_parameters"],
            12,
            "must hold the plan's model without",
        ),
        ("evaluation", ["models", NAME, "num_parameters"], 12, "must be of the plan's model, tiny"),
        (
            "evaluation",
            ["models", "out/model", "averages", "generation", "above_chance"],
            None,
            "but is damaged: KeyError: 'above_chance'",
        ),
        (
            "evaluation",
            ["models", "out/model", "averages", "drawing"],
            {},
            "but is damaged: KeyError: 'drawing'",
        ),
        ("recovery", ["quality", "recovered"], None, "but is damaged: KeyError: 'recovered'"),
        ("recovery", ["quality", "pruned", "nll"], 10**400, "64 bits at most"),
        ("recovery", ["model"], {"fingerprint": "other"}, "with fingerprint .* got other"),
        ("results", ["dense", "num_parameters"], 12, "with num_parameters .* got 12"),
        ("results", ["pruned", "speed"], {}, "but is damaged: KeyError: 'prefill'"),
        ("scores", ["model", "fingerprint"], "other", "with fingerprint .* got other"),
    ],
)
def test_damaged_and_foreign_files(
    run: tuple[Path, PruningPlan], kind: str, way: list[str], value: Any, message: str
) -> None:
    directory, plan = run
    file = directory / f"{kind}.json"
    made = {"evaluation": lambda: evaluation(plan), "recovery": recovery}
    content = made[kind]() if kind in made else json.loads(file.read_text())
    _spoil(content, way, value)
    file.write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match=message):
        read_sources(directory)


def test_averages_of_version_2_are_of_no_kind(run: tuple[Path, PruningPlan]) -> None:
    directory, plan = run
    content = evaluation(plan)
    content["schema_version"] = 2
    for model in content["models"].values():
        model["averages"] = model["averages"]["classification"]
    write_json(directory / "evaluation.json", content)
    found = read_sources(directory).evaluation
    assert found is not None
    labels = [row.label for row in quality_rows(found)[1] if row.group == "averages"]
    assert labels[::2] == ["average of all tasks (2), %", "average without tasks at chance (1), %"]


def test_an_evaluation_of_another_cut_or_weights(
    run: tuple[Path, PruningPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, plan = run
    content = evaluation(plan)
    file = directory / "evaluation.json"
    for removed, message in (
        (sorted(plan.removed), None),
        ([layer for layer in range(6) if layer not in plan.removed][:2], "must be of the plan's"),
    ):
        content["models"]["out/model"]["removed"] = removed
        write_json(file, content)
        if message is None:
            assert read_sources(directory).evaluation is not None
            continue
        with pytest.raises(SimdiffError, match=message):
            read_sources(directory)
    content["models"]["out/model"]["removed"] = sorted(plan.removed)
    content["models"][NAME]["fingerprint"] = "other"
    write_json(file, content)
    with pytest.raises(SimdiffError, match="with fingerprint .* got other"):
        read_sources(directory)
    # A fine-tuned version has the same fingerprint.
    content["models"][NAME] |= {
        "fingerprint": plan.model["fingerprint"],
        "weights": plan.model["weights"],
    }
    write_json(file, content)
    capsys.readouterr()
    assert read_sources(directory).evaluation is not None
    assert "Note" not in capsys.readouterr().err
    content["models"][NAME]["weights"] = {"memory": "other"}
    write_json(file, content)
    message = re.escape(f"of the model of the plan, {NAME}, got {NAME}, which has the same shapes")
    with pytest.raises(SimdiffError, match=message):
        read_sources(directory)
    content["models"][NAME]["weights"] = {}
    write_json(file, content)
    assert read_sources(directory).evaluation is not None
    told = " ".join(capsys.readouterr().err.split())
    assert f"Note: {file} and the plan are joined by the names and shapes" in told


def test_a_recovery_of_another_cut(run: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    directory, plan = run
    other = tmp_path / "recovered"
    other.mkdir()
    write_json(other / "recovery.json", recovery())
    assert read_sources(directory, recovery=other).recovery is not None
    content = plan.to_dict()
    kept = next(layer for layer in range(1, 6) if layer not in plan.removed)
    content["removed"] = [plan.removed[0], kept]
    write_json(other / "plan.json", content)
    with pytest.raises(SimdiffError, match="must be a recovery of the plan's cut"):
        read_sources(directory, recovery=other / "recovery.json")
    with pytest.raises(SimdiffError, match=r"must be a directory with plan.json, a comp"):
        read_sources(tmp_path / "none")
    with pytest.raises(SimdiffError, match=r"must be a directory with plan.json, a comp"):
        read_sources(tmp_path)


def test_files_of_several_cuts_or_models_without_a_plan(
    run: tuple[Path, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simdiff.report.sources.check_bench", lambda *of: None)  # of its head alone
    _, plan = run
    removed = sorted(plan.removed)
    quality, speed = tmp_path / "e.json", tmp_path / "b.json"
    content = evaluation(plan)
    content["models"][NAME]["fingerprint"] = "mine"

    def write(cut: list[int], model: str) -> None:
        content["models"]["out/model"]["removed"] = cut
        write_json(quality, content)
        head = {**header("simdiff.bench"), "removed": removed}
        write_json(speed, head | {"models": {"dense": {"fingerprint": model}}})

    write(removed, "mine")
    joined = read_sources(quality, bench=speed)
    assert (joined.evaluation is None, joined.bench is None) == (False, False)
    write([0, 1], "mine")
    for source, given in ((quality, {"bench": speed}), (speed, {"evaluation": quality})):
        with pytest.raises(SimdiffError, match="must be of the cut of .*b.json"):
            read_sources(source, **given)
    write(removed, "another")
    with pytest.raises(SimdiffError, match="e.json: must be of the model of .*b.json"):
        read_sources(speed, evaluation=quality)
    content["models"][NAME]["weights"] = {"files": "one"}
    write([0, 1], "mine")
    written = json.loads(speed.read_text())
    written["models"]["dense"]["weights"] = {"files": "another"}
    write_json(speed, written)
    with pytest.raises(SimdiffError, match=f"of {re.escape(str(speed))}, None, got .*other weig"):
        read_sources(speed, evaluation=quality)
    with pytest.raises(SimdiffError, match="are a file of an evaluation each: give one"):
        read_sources(quality, evaluation=quality)
