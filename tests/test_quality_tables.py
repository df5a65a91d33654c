"""docs/quality.md and README's block say what the committed results say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import quality_tables


def result(seeds: dict[int, dict[str, list[float]]], chosen: dict[str, dict[int, str]]) -> str:
    """A file of the protocol: held-out losses by seed and plan, the plans of ways by seed."""
    return json.dumps({
        "model": {"name": "tiny", "converted_from": None},
        "settings": {"text": "words", "windows": 4, "window_length": 8, "held_out_windows": 3,
                     "held_out_length": 8, "dtype": "float32"},
        "machine": "one", "threads": 1, "commit": "abc",
        "seeds": [
            {"seed": seed, "licence": "none", "held_out_losses": losses,
             "rows": [{"way": way, "removed": 2, "layers": plans[seed], "windows_read": 5 * seed,
                       "seconds": 1.0, "problem": None}
                      for way, plans in chosen.items() if seed in plans]}
            for seed, losses in seeds.items()
        ],
    })  # fmt: skip


OURS = quality_tables.OURS


@pytest.fixture
def case(tmp_path: Path) -> quality_tables.Case:
    seeds = {
        1: {"dense": [1.0] * 3, "0 1": [2.0, 3.0, 4.0], "1 2": [2.1, 3.3, 4.5]},
        2: {"dense": [1.0] * 3, "0 1": [3.0, 3.0, 3.0], "1 2": [2.9, 3.0, 3.1]},
    }
    chosen = {OURS: {1: "0 1", 2: "0 1"}, "other": {1: "1 2", 2: "1 2"}, "one": {1: "1 2"},
              "like": {1: "0 1", 2: "0 1"}}  # fmt: skip
    (tmp_path / "quality-a.json").write_text(result(seeds, chosen))
    more = {OURS: {1: "1 2"}, "extra": {1: "2 3"}}
    losses = {1: {**seeds[1], "2 3": [1.0, 2.0, 3.0]}}
    (tmp_path / "quality-a-all.json").write_text(result(losses, more))
    (case,) = quality_tables.load(tmp_path)
    return case


def test_ratio(case: quality_tables.Case) -> None:
    """Gaps 0.1, 0.3, 0.5 (mean 0.3, variance 0.04) and -0.1, 0, 0.1 (mean 0, variance 0.01).

    Mean 0.15, standard error sqrt(0.04 / 3 + 0.01 / 3) / 2 = 0.0645497, 4 degrees of freedom:
    t = 2.776445, so 0.15 ± 0.179219. The first seed alone: 0.3 ± 4.302653 sqrt(0.04 / 3).
    """
    found = quality_tables.ratio(case, "other", 2)
    assert found is not None
    assert [math.log(v) for v in (found.value, found.low, found.high)] == pytest.approx(
        [0.15, 0.15 - 0.179219, 0.15 + 0.179219], abs=1e-6
    )
    assert str(found) == "1.16 [0.97, 1.39] not distinguishable"
    one = quality_tables.ratio(case, "one", 2)
    assert one is not None
    assert math.log(one.high) == pytest.approx(0.3 + 4.302653 * 0.1154701, abs=1e-6)
    assert str(quality_tables.ratio(case, "like", 2)) == "same plan"
    assert quality_tables.ratio(case, "none", 2) is None


def test_more_ways_of_a_seed(case: quality_tables.Case) -> None:
    """The plan of the first file stays; what only the other holds is added."""
    assert case.rows[OURS, 2][1]["layers"] == "0 1"
    assert [*case.rows["extra", 2]] == [1]
    extra = quality_tables.ratio(case, "extra", 2)
    assert extra is not None
    assert (extra.value, extra.low, extra.high) == pytest.approx((math.exp(-1),) * 3)
    assert "better in 1, worse in 0, the same or not distinguishable in 0 of 1" in (
        quality_tables.spread([case], "extra")
    )
    assert "better in 0, worse in 0, the same or not distinguishable in 1 of 1" in (
        quality_tables.spread([case], "like")
    )


def test_page(case: quality_tables.Case) -> None:
    page = quality_tables.page([case])
    # exp(3) of both seeds; exp(3.3) and exp(3).
    assert f"| {OURS} | 20.1 | 20.1, 20.1 |  | 5 to 10 | 1 |" in page
    assert (
        "| other | 23.3 | 27.1, 20.1 | 1.16 [0.97, 1.39] not distinguishable | 5 to 10 | 1 |"
        in (page)
    )
    assert "Seeds 1, 2; dense 2.72, 2.72." in page


def test_committed_pages_are_what_the_results_say() -> None:
    wrong = [p.name for p, text in quality_tables.written().items() if p.read_text() != text]
    assert wrong == [], "python benchmarks/quality_tables.py"


def test_another_result_is_another_page(tmp_path: Path) -> None:
    for path in quality_tables.RESULTS.glob("quality-*.json"):
        shutil.copy(path, tmp_path)
    changed = next(tmp_path.glob("quality-*.json"))
    content = json.loads(changed.read_text())
    losses = content["seeds"][0]["held_out_losses"]
    losses["dense"][0] += 0.1
    changed.write_text(json.dumps(content))
    page = quality_tables.PAGE
    assert quality_tables.written(tmp_path)[page] != quality_tables.written()[page]
    with pytest.raises(SystemExit, match=r"must hold quality-\*\.json, got none"):
        quality_tables.written(tmp_path / "none")
