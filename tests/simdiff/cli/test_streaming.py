"""Every command with --stream: the same result files, nothing left, and what it says."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import simdiff as package
from simdiff.errors import SimdiffError
from simdiff.evaluation.streamed_losses import StreamedLosses
from simdiff.models.layer_by_layer import LayerByLayer
from support.commands import simdiff
from support.weights import of_files

TEXT = ("--num-windows", "4", "--window-length", "16", "--batch-size", "2")
WAYS = ("--no-stream", "--stream")


@pytest.fixture
def given(tiny_checkpoint: Path, tiny_text: Path) -> tuple[object, ...]:
    return (tiny_checkpoint, "--text", tiny_text, *TEXT)


def both(
    command: str,
    *arguments: object,
    output: Path,
    name: str = "",
    streamed: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """The results of a command in both ways; the second leaves nothing but its output."""
    found = []
    for way in WAYS:
        path = output / f"{command}{way}{'' if name else '.json'}"
        further = streamed if way == "--stream" else ()
        assert simdiff(command, *arguments, way, *further, "-o", path) == 0
        found.append(of_files(json.loads((path / name if name else path).read_text())))
    assert {path.name.replace(".json", "") for path in output.iterdir()} >= {
        f"{command}{way}" for way in WAYS
    }
    assert not [path for path in output.iterdir() if "states" in path.name]
    return found


@pytest.mark.parametrize(
    ("effort", "options"), [("quick", ("--sublayers",)), ("normal", ("--skip-leading", 1))]
)
def test_score_then_plan(given, tmp_path: Path, effort: str, options: tuple[Any, ...]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    one, other = both("score", *given, *options, output=output)
    assert ("sublayers" in one) == ("--sublayers" in options)
    assert {**one, "created": 0} == {**other, "created": 0}
    scores = output / "score--stream.json"
    command = ("plan", scores, "--num-layers", 2, "--model", given[0], "--effort", effort)
    one, other = both(*command, output=output)
    assert {**one, "created": 0} == {**other, "created": 0}
    assert bool(one["search"]) == (effort == "normal")


def test_until_stable(given, tmp_path: Path) -> None:
    """Each check reads more windows in a pass of its own, and goes on with the same scores."""
    output = tmp_path / "out"
    output.mkdir()
    until = ("--calibrate-until-stable", "--max-windows", 16, "--stable-confidence", 1)
    one, other = both("score", *given, *until, "--num-layers", 2, output=output)
    assert len(one["stability"]["checks"]) > 1
    assert {**one, "created": 0} == {**other, "created": 0}


def test_run(given, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    output.mkdir()
    one, other = both("run", *given, "--num-layers", 2, output=output, name="results.json")
    assert "no speed is measured and nothing generated" in capsys.readouterr().err
    for stage in ("dense", "pruned"):
        assert "speed" in one[stage]
        assert "speed" not in other[stage]
        assert one[stage]["perplexity"] == other[stage]["perplexity"]
    assert other["streamed"]
    assert one["removed"] == other["removed"]
    whole, streamed = (output / f"run{way}" / "model" for way in WAYS)
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (streamed / name).read_bytes()
    assert not (output / "run--stream" / "states").exists()
    assert (
        "not measured, since the model was streamed"
        in (output / "run--stream" / "report.html").read_text()
    )
    assert simdiff("report", output / "run--stream", "-o", tmp_path / "report.html") == 0


def test_compare(given, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    shares: dict[tuple[frozenset[int], int], float] = {}
    of_a_pass, inner = StreamedLosses.seconds, StreamedLosses.read

    def seconds(self, *one):
        shares[one] = of_a_pass(self, *one)
        return 100

    passes = []

    def read(self):
        start = time.perf_counter()
        inner(self)
        passes.append(time.perf_counter() - start)

    monkeypatch.setattr(StreamedLosses, "seconds", seconds)
    monkeypatch.setattr(StreamedLosses, "read", read)
    names = "simdiff,block-influence,greedy-perplexity"
    options = ("--criteria", names, "--num-layers", "1,2", "--evaluation-windows", 2)
    options += ("--effort", "quick")  # the default of a streamed model, and not of others
    one, other = both("compare", *given, *options, output=output, name="compare.json")
    for content in (one, other):
        seconds_to_plan = [cell.pop("seconds_to_plan") for cell in content["cells"]]
    # Each plan has its share of the passes, that of the windows that it read: greedy search reads
    # two of 6 plans, and then of 5 more.
    assert [int(one // 100) for one in seconds_to_plan] == [1, 0, 12, 1, 0, 22]
    assert sum(shares.values()) == pytest.approx(sum(passes[:2]), rel=0.05)
    assert one["cells"] == other["cells"]
    assert one["dense"] == other["dense"]


def test_eval(given, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    output.mkdir()
    command = ("eval", *given[:-2], "--remove", "1,4", "--stride", 8)
    one, other = both(*command, output=output)
    assert one["models"] == other["models"]
    assert "GB of weights read" in capsys.readouterr().err
    assert simdiff("eval", given[0], *given[1:-2], "--stream") == 0


def test_eval_of_two_models_goes_on_after_a_kill(given, tmp_path: Path, monkeypatch) -> None:
    second = shutil.copytree(given[0], tmp_path / "second")
    content = safetensors.torch.load_file(second / "model.safetensors")
    content["model.norm.weight"] *= 2
    safetensors.torch.save_file(content, second / "model.safetensors", {"format": "pt"})
    command = ("eval", given[0], second, *given[1:-2], "--stream", "-o", tmp_path / "eval.json")
    step, calls = LayerByLayer.step, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4 * 6 + 4 * 2 + 1:  # 4 windows: the second model's third layer
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(LayerByLayer, "step", interrupted)
    assert simdiff(*command) == 130
    assert simdiff(*command) == 0
    assert len(calls) == (4 * 6 + 4 * 2 + 1) + (4 * 6 + 4 * 4)
    found = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert len({model["perplexity"] for model in found.values()}) == 2
    assert not [path for path in tmp_path.iterdir() if "states" in path.name]


def test_recover(given, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    output.mkdir()
    command = ("recover", *given, "--remove", "1,4")
    little = ("--stream-memory", "1KB")
    one, other = both(*command, output=output, name="recovery.json", streamed=little)
    assert one["changed"] or "those of the plain cut" in one["notes"][0]
    varying = {"seconds": 0, "created": 0}
    assert {**one, **varying} == {**other, **varying}
    whole, streamed = (output / f"recover{way}" for way in WAYS)
    differing = {"recovery.json", "README.md", "plan.json", "report.html"}
    names = {path.name for path in whole.iterdir()} - differing
    for name in names - {"config.yaml"}:
        assert (whole / name).read_bytes() == (streamed / name).read_bytes(), name
    assert simdiff("verify", streamed, "--against", given[0]) == 0
    capsys.readouterr()
    words = (*command, "--stream", "--dtype", "bfloat16", "-o", tmp_path / "r")
    assert simdiff(*words) == 2
    assert "written as it is stored, in torch.float32" in capsys.readouterr().err


def test_what_needs_the_whole_model_is_refused(given, tmp_path: Path, capsys) -> None:
    command = ("recover", *given, "--remove", "1", "--stream", "--method", "lora")
    assert simdiff(*command, "-o", tmp_path / "r") == 2
    assert "needs the whole model in memory, got a streamed one" in capsys.readouterr().err


def test_python_functions(given, tmp_path: Path) -> None:
    windows = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    made = [package.score(given[0], windows, stream=stream) for stream in (False, True)]
    assert made[0].blocks == made[1].blocks
    folder = tmp_path / "states"
    options = package.StreamOptions(memory=0, folder=folder, always=True)
    plans = [
        package.plan(made[0], 2, model=given[0], windows=windows, stream=stream)
        for stream in (False, options)
    ]
    assert plans[0].removed == plans[1].removed
    assert not folder.exists()
    with pytest.raises(SimdiffError, match="more than 1 bytes of memory"):
        package.score(given[0], windows, stream=package.StreamOptions(memory=1, always=True))
