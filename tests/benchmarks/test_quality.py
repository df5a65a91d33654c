"""The quality protocol on a tiny model: what its ways choose, read and lose, computed apart."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from simdiff.data.halves import split_text
from simdiff.data.text import token_windows
from simdiff.evaluation.losses import window_losses
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.models.loading import load_model
from simdiff.planning.criteria import CRITERIA
from simdiff.planning.exchange import affordable_reads
from simdiff.surgery.layers import layers_removed

GREEDY = (1, 2)


@pytest.fixture
def protocol(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    import quality

    def run(*more: str, name: str = "result") -> dict[str, Any]:
        output = tmp_path / f"{name}.json"
        (tmp_path / "cache").mkdir(exist_ok=True)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "quality.py",
                str(tiny_checkpoint),
                "--text",
                str(tiny_text),
                "--windows",
                "4",
                "--window-length",
                "16",
                "--held-out-windows",
                "3",
                "--held-out-length",
                "12",
                "--dtype",
                "float32",
                "--cache",
                str(tmp_path / "cache"),
                "--output",
                str(output),
                "--greedy",
                *map(str, GREEDY),
                *more,
            ],
        )
        quality.main()
        content: dict[str, Any] = json.loads(output.read_text())
        return content

    return run


def test_the_protocol(protocol: Any, tiny_checkpoint: Path, tiny_text: Path) -> None:
    result = protocol("--seeds", "1", "2")
    assert [seed["seed"] for seed in result["seeds"]] == [1, 2]
    model, tokenizer = load_model(str(tiny_checkpoint), device="cpu")
    first = result["seeds"][0]
    calibration, held_out = split_text(tiny_text, 1)
    windows, others = (
        token_windows(part, tokenizer, part="all", num_windows=count, window_length=length).tokens
        for part, count, length in ((calibration, 4, 16), (held_out, 3, 12))
    )

    def mean(removed: Collection[int], num_windows: int) -> float:
        with layers_removed(model, removed):
            return perplexity(model, windows[:num_windows]).nll

    rows = {(row["way"], row["removed"]): row for row in first["rows"]}
    counts = (1, 2)  # 10% and 25% of six layers
    assert {count for _, count in rows} == {*counts}
    reading = {f"{name} + reads" for name in CRITERIA}
    ways = {way for way, _ in rows}
    assert ways >= {*CRITERIA} | reading | {"one-shot perplexity, 4 windows"}
    for num_windows in GREEDY:
        removed: tuple[int, ...] = ()
        for count in counts:
            free = [layer for layer in range(6) if layer not in removed]
            removed = min(((*removed, k) for k in free), key=lambda p: mean(p, num_windows))
            row = rows[f"greedy perplexity, {num_windows} windows", count]
            assert row["layers"] == " ".join(map(str, sorted(removed)))
            assert row["windows_read"] == num_windows * {1: 6, 2: 6 + 5}[count]
    for (way, count), row in rows.items():
        if way in CRITERIA:
            assert row["windows_read"] == 0
        if way in reading:
            assert row["windows_read"] <= max(2, affordable_reads(6, count, 4))
    for layers, losses in first["held_out_losses"].items():
        plan = [] if layers == "dense" else [*map(int, layers.split())]
        if not plan:
            wanted = window_losses(model, others, description=None)
        else:
            with layers_removed(model, plan):
                wanted = window_losses(model, others, description=None)
        assert losses == pytest.approx(wanted, abs=2e-5)
    assert {row["layers"] for row in first["rows"]} | {"dense"} == {*first["held_out_losses"]}
    assert first["documents_sha256"] != result["seeds"][1]["documents_sha256"]
    assert result["settings"]["held_out_windows"] == 3
    assert len(result["model"]["safetensors_sha256"]) == 64
    again = protocol("--seeds", "1", "2", name="again")  # all reads from the cache
    for seed in (*result["seeds"], *again["seeds"]):
        for row in [seed, *seed["rows"]]:
            row.pop("seconds", None), row.pop("calibration_seconds", None)
    assert again["seeds"] == result["seeds"]


def test_texts_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are on one side, in one pool, and another seed divides them anew."""
    import texts

    pools = {pool: texts.wikipedia(pool) for pool in texts.POOLS}
    development, reporting = ({d for group in groups for d in group} for groups in pools.values())
    assert len(development) >= 2 * texts._SEEN
    assert not development & reporting
    assert len(development) + len(reporting) == 2938
    group = next(group for group in pools["reporting"] if len(group) > 1)
    monkeypatch.setattr(texts, "wikipedia", lambda pool: pools[pool])
    sides = []
    for seed in range(1, 7):
        found = texts.halves("wikipedia", "reporting", seed)
        side = [document in found.calibration for document in group]
        assert len({*side}) == 1
        sides.append(side[0])
        assert not {*found.calibration} & {*found.held_out}
    assert len({*sides}) == 2


def test_additive_costs() -> None:
    import quality

    costs = quality.Additive([1.0, 2, 4])
    assert [costs.plan_cost(p) for p in itertools.combinations(range(3), 2)] == [3, 5, 6]
    assert costs.num_layers == 3


def test_a_mean_that_is_not_finite_is_the_worst(tiny_checkpoint: Path) -> None:
    import quality

    model, _ = load_model(str(tiny_checkpoint), device="cpu")
    model.model.layers[2].mlp.down_proj.weight.data.fill_(torch.nan)
    reads = quality.Reads(model, torch.ones(2, 8, dtype=torch.int64), None)
    assert reads.mean((1,), 2) == math.inf
    assert reads.mean((2,), 2) < math.inf
    assert reads.take()[0] == 4
