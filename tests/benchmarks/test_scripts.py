"""The scripts of benchmarks/ on a tiny model: what they write, against what is computed apart."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.data.halves import split_text
from simdiff.data.text import token_windows
from simdiff.evaluation.losses import window_losses
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.models.loading import load_model
from simdiff.planning.make_plan import make_plan
from simdiff.planning.names import EFFORTS
from simdiff.scoring.calibration_pass import score
from simdiff.surgery.layers import layers_removed

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
    with layers_removed(model, (2, 3)):
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
    assert units == 3 * [("attention", 2), ("mlp", 1)]  # by two criteria, and searched
    assert [bool(row["share_of_greedy"]) for row in rows] == [False] * 4 + [True] * 2
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
def test_quantised(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on a coarse grid stand for packed ones."""
    import quantised

    def coarse(name: str, kind: str) -> PreTrainedModel:
        packed, _ = load_model(name, device="cpu")
        for layer in packed.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    step = module.weight.abs().max() / (7 if kind == "nf4" else 2)
                    module.weight.data = (module.weight.data / step).round() * step
        return packed

    monkeypatch.setattr(quantised, "packed", coarse)
    output = tmp_path / "quantised.json"
    sizes = ("--windows", 3, "--window-length", 16, "--held-out-windows", 2)
    run("quantised", tiny_checkpoint, *sizes, "--output", output)
    found = json.loads(output.read_text())
    fine, rough = found["kinds"]
    for metric, values in fine["metrics"].items():
        assert values["largest_relative_difference"] > 0
        assert rough["metrics"][metric]["rank_correlation"] <= values["rank_correlation"]
    for row in (*rough["plans"], rough["searched"]):
        assert len(row["full"]) == len(row["quantised"]) == row["num_layers"]
        of_interest = row["criterion"] == "simdiff" and row["full"] != row["quantised"]
        assert ("perplexity" in row) == of_interest
    assert quantised.difference([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])["rank_correlation"] == 1.0
    swapped = quantised.difference([1.0, 2.0, 4.0], [2.0, 1.0, 4.0])
    assert swapped == {"rank_correlation": 0.5, "largest_relative_difference": 1.0}


def test_effort(
    run: Run,
    model: PreTrainedModel,
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Plans of every effort, also without a part, of greedy search, and their held-out losses."""
    import effort

    used: list[Any] = []

    def planned(*given: Any, **options: Any) -> Any:
        if "effort" in options:
            used.append(EFFORTS[options["effort"]])
        return make_plan(*given, **options)

    monkeypatch.setattr(effort, "make_plan", planned)
    output = tmp_path / "effort.json"
    calibration = ("--windows", 4, "--window-length", 16)
    others = ("--held-out-windows", 3, "--held-out-length", 12)
    ways = ("--shares", 0.34, "--greedy", 2, "--without", "exchanges", "lists", "windows")
    of = (tiny_checkpoint, "--text", tiny_text, "--dtype", "float32")
    run("effort", *of, *calibration, *others, *ways, "--cache", tmp_path, "--output", output)
    content = json.loads(output.read_text())
    assert "model" not in content["settings"]
    (seed,) = content["seeds"]
    rows = {row["way"]: row for row in seed["rows"]}
    without = {f"normal without {part}" for part in ("exchanges", "lists", "windows")}
    assert {*rows} == {*EFFORTS, *without, "block influence", "greedy, 2 windows"}
    divided = split_text(tiny_text, 1)
    tokenizer = load_model(str(tiny_checkpoint), device="cpu")[1]
    windows, held_out = (
        token_windows(part, tokenizer, part="all", num_windows=count, window_length=length).tokens
        for part, count, length in zip(divided, (4, 3), (16, 12), strict=True)
    )
    scores = score(model, [windows], progress=False)
    for name in EFFORTS:
        plan = make_plan(scores, 2, model=model, windows=windows, effort=name, evaluation_windows=4)
        assert rows[name]["layers"] == " ".join(map(str, sorted(plan.removed)))
        assert rows[name]["search"].get("share_of_greedy") == plan.search.get("share_of_greedy")
    usual = EFFORTS["normal"]
    assert usual is not None
    parts = [replace(usual, **changed) for changed in effort.WITHOUT.values()]
    assert used == [*EFFORTS.values(), *parts]
    removed: tuple[int, ...] = ()
    for _ in range(2):
        plans = [(*removed, layer) for layer in range(6) if layer not in removed]
        removed = min(plans, key=lambda plan: sum(losses_without(model, plan, windows[:2])))
    assert rows["greedy, 2 windows"]["layers"] == " ".join(map(str, sorted(removed)))
    for layers, losses in seed["held_out_losses"].items():
        gone = [] if layers == "dense" else [*map(int, layers.split())]
        assert losses == pytest.approx(losses_without(model, gone, held_out), abs=2e-5)


def losses_without(
    model: PreTrainedModel, removed: Sequence[int], windows: torch.Tensor
) -> list[float]:
    with layers_removed(model, removed) if removed else contextlib.nullcontext():
        return window_losses(model, windows, description=None)


def test_calibration_study(
    run: Run, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Each setting is measured, and the table holds it against the base and draws of it."""
    import calibration_study
    import calibration_tables
    import texts

    halves = texts.halves
    monkeypatch.setattr(texts, "halves", lambda _, pool, seed: halves(str(tiny_text), pool, seed))
    for name, value in {"TOKENS": 64, "LENGTH": 16}.items():
        monkeypatch.setattr(calibration_study, name, value)
    monkeypatch.setattr(calibration_study, "LENGTHS", (8, 32))
    monkeypatch.setattr(calibration_study, "SKIPPED", (1, 4))
    monkeypatch.setattr(calibration_study, "HELD_OUT_LENGTH", 12)
    output, picture = tmp_path / "study.json", tmp_path / "study.png"
    sizes = ("--held-out-windows", 3, "--dtype", "float32")
    run("calibration_study", tiny_checkpoint, *sizes, "--output", output)
    content = json.loads(output.read_text())
    settings = {(row["axis"], row.get("setting")) for row in content["rows"]}
    assert settings >= {("base", "base"), ("draw", "3"), ("length", "8"), ("source", "mixture")}
    heads, table = calibration_tables.table([content])
    assert heads[1:] == ("wikipedia, none", "wikipedia, quick", "python, none", "python, quick")
    cut = [row for row in content["rows"] if row["axis"] != "dense"]
    rows = [row for row in cut if (row["effort"], row["removed"]) == ("none", 2)]
    mean = {f"{row['axis']}: {row['setting']}": statistics.fmean(row["python"]) for row in rows}
    base = mean.pop("base: base")
    found = calibration_tables.ratios(content, "none", 2, "python")
    assert found == pytest.approx({name: math.exp(loss - base) for name, loss in mean.items()})
    assert {name for name, *_ in table} == {*mean}
    run("calibration_tables", output, "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.model  # for its text
def test_search(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It ends where states used again give other losses."""
    output = tmp_path / "search.json"
    sizes = ("--windows", 3, "--window-length", 16, "--dtype", "float32")
    run("search", "--model", tiny_checkpoint, *sizes, "--output", output)
    found = json.loads(output.read_text())
    assert (found["candidates"], found["windows"]) == (6, [3, 16])
    assert found["ratio"] == found["plain_seconds"] / found["reusing_seconds"]


@pytest.mark.model  # for its text
@pytest.mark.parametrize("part", ["layers", "whole pass"])
def test_overhead(run: Run, part: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of one repeat every interval is its ratio; less is spent in the scorer than in the pass."""
    output = tmp_path / "overhead.json"
    more = ("--whole-pass",) if part == "whole pass" else ("--batches", 2)
    run("overhead", tiny_checkpoint, "--quick", "--dtypes", "float32", "--output", output, *more)
    (found,) = json.loads(output.read_text())
    assert (found["tokens"], found["dtype"]) == ("2 x 16", "float32")
    if part == "layers":
        assert [found["ratio"]] == pytest.approx(found["ratio_of_pairs"], abs=1e-4)
        # The bare forward is written to a tenth of a millisecond.
        spent, bare = found["seconds_in_update"], found["bare_seconds"]
        assert spent / (bare + 6e-5) < found["share_in_update"] < spent / (bare - 6e-5)
        ends = found["interval"]["share_in_update"]
        assert ends["low"] == found["share_in_update"] == ends["high"]
        assert len(found["memory_above_bare_mb_of_pairs"]) == 1
    else:
        (turn,) = found["turns"]
        assert found["share_of_bare"]["layers"] > 0
        for name, spent in zip(("layers", "with blocks"), turn[1:], strict=True):
            assert found["seconds_in_pass"][name] == pytest.approx(spent, abs=1e-4)
            ends = found["interval"]["share_of_bare"][name]
            assert ends["low"] == found["share_of_bare"][name] == ends["high"]


@pytest.fixture
def of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`overhead` reads numbers, which need no text."""
    import overhead

    def text(source: str, tokenizer: object, *, num_windows: int, window_length: int) -> Any:
        numbers = torch.arange(num_windows * window_length) % 90

        class Windows:
            tokens = numbers.view(num_windows, window_length)

            def batches(self, size: int) -> list[torch.Tensor]:
                return list(self.tokens.split(size))

        return Windows()

    monkeypatch.setattr(overhead, "token_windows", text)


@pytest.mark.usefixtures("of_numbers")
def test_overhead_is_that_of_medians(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds of given seconds: ratios 1.5, 1.25, 1.1, shares 0.1, 0.2, 0.05 and more."""
    import overhead

    bare, scored, within = (iter(times) for times in ((1, 2, 4), (1.5, 2.5, 4.4), (0.1, 0.4, 0.2)))
    of_pass = {False: iter((0.1, 0.4, 0.2)), True: iter((0.2, 0.6, 0.8))}
    peaks = {overhead.bare: iter((100e6, 100e6, 90e6)), overhead.scored: iter((103e6, 101e6, 99e6))}
    monkeypatch.setattr(
        overhead, "seconds", lambda f, *_: next(bare if f is overhead.bare else scored)
    )
    monkeypatch.setattr(overhead, "seconds_in_update", lambda *_: next(within))
    monkeypatch.setattr(overhead, "seconds_in_pass", lambda *given: next(of_pass[given[2]]))
    monkeypatch.setattr(overhead, "peak_resident_bytes", lambda f, *_: next(peaks[f]))
    found = overhead.measure(str(tiny_checkpoint), "float32", 3, 2, (2, 16))
    for name, value in {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "tokens": "2 x 16",
        "bare_seconds": 2,
        "scored_seconds": 2.5,
        "ratio": 1.25,
        "ratio_of_pairs": [1.5, 1.25, 1.1],
        "seconds_in_update": 0.2,
        "share_in_update": 0.1,
        "memory_above_bare_mb": 1.0,
        "memory_above_bare_mb_of_pairs": [3.0, 1.0, 9.0],
        "batches_for_memory": 2,
        "interval": {
            "ratio": {"low": 4.4 / 4, "high": 1.5, "coverage": 0.75},
            "share_in_update": {"low": 0.05, "high": 0.2, "coverage": 0.75},
        },
    }.items():
        assert found[name] == value, name
    bare = iter((1, 2, 4))
    found = overhead.measure_pass(str(tiny_checkpoint), "bfloat16", 3, (2, 16))
    for name, value in {
        "dtype": "bfloat16",
        "tokens": "2 x 16",
        "bare_seconds": 2,
        "seconds_in_pass": {"layers": 0.2, "with blocks": 0.6},
        "share_of_bare": {"layers": 0.1, "with blocks": 0.2},
        "turns": [[1, 0.1, 0.2], [2, 0.4, 0.6], [4, 0.2, 0.8]],
    }.items():
        assert found[name] == value, name


def test_seconds_of_scoring_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by a second a look, every call takes one: how many are there?"""
    import overhead

    ticks = itertools.count()
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    batches = [torch.ones(2, 8, dtype=torch.int64), torch.ones(3, 8, dtype=torch.int64)]
    assert overhead.seconds_in_update(model, batches) == 2 * 6  # a call for each layer
    # Those, and before and after each batch; with blocks one more, of all layers at once.
    assert overhead.seconds_in_pass(model, batches, False) == 2 * (6 + 2)
    assert overhead.seconds_in_pass(model, batches, True) == 2 * (6 + 3)
    assert overhead.seconds(lambda x: x, 1) == 1


@pytest.mark.usefixtures("of_numbers")
def test_overhead_refuses_wrong_scores(
    run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is timed where the scores are not those of float64."""
    import overhead

    plain = overhead.scored

    def wrong(model: PreTrainedModel, batches: Any, backend: str | None) -> Any:
        return plain(model, batches if backend else [2 * batches[0] % 90], backend)

    monkeypatch.setattr(overhead, "scored", wrong)
    with pytest.raises(AssertionError, match="not close"):
        run("overhead", tiny_checkpoint, "--quick", "--dtypes", "float32")


def test_checkpoint_surgery(run: Run, tmp_path: Path) -> None:
    """4 tiny layers, of which one goes: what is kept is counted from the shapes."""
    import checkpoint_surgery

    output = tmp_path / "surgery.json"
    layers = ("--layers", 4, "--real-layers", 4)
    run("checkpoint_surgery", "--quick", *layers, "--directory", tmp_path, "--output", output)
    found = json.loads(output.read_text())
    shapes = checkpoint_surgery.SHAPES_QUICK
    size, inner, words = (shapes[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    layer = 3 * size * size + 3 * size * inner + 2 * size
    around = 2 * words * size + size
    assert found["speed"]["kept_gb"] == pytest.approx(2 * (3 * layer + around) / 1e9)
    memory, speed = found["memory"], found["speed"]
    assert memory["checkpoint_gb"] == pytest.approx(2 * (4 * layer + around) / 1e9)
    assert memory["kept_gb"] == speed["kept_gb"]
    assert memory["added_peak_mb"] == memory["command_peak_mb"] - memory["libraries_peak_mb"]
    assert memory["streaming_peak_mb"] < memory["libraries_peak_mb"]
    assert speed["ratios"] == [speed["ratio"]]
    assert speed["ratio"] == pytest.approx(speed["cut_mb_per_s"] / speed["cp_mb_per_s"])
    assert [path.name for path in tmp_path.iterdir()] == ["surgery.json"]
