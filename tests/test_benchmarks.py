"""The benchmarks' own logic on tiny cases: results are checked, wrong ones are not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import predict
import pytest
import report
import subjects
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_the_predicted_table_is_what_its_script_writes() -> None:
    assert predict.TARGET.read_text() == predict.document()
    h100 = predict.GPUS[2]
    # 16384 tokens of 2 x 4096 bfloat16 entries: 268 MB at 3.35 TB/s.
    assert predict.floors(h100, 4096, 2, 16384)["memory"] == pytest.approx(80.1e-6, rel=1e-2)
    # LLaMA2-7B: 202 M parameters a layer, two flops each, and attention over 1024 positions.
    flops = predict.MODELS[0].layer_flops(2048)
    assert flops == pytest.approx(2 * 202.4e6 + 4 * 1024 * 4096, rel=1e-3)


def test_all_blocks_of_llama_are_predicted_below_three_percent_of_the_forward() -> None:
    h100, model, tokens = predict.GPUS[2], predict.MODELS[0], 16384
    times = predict.block_floors(h100, 33, 4096, tokens)
    # 16384 tokens of 33 x 4096 bfloat16 entries: 4.43 GB at 3.35 TB/s.
    assert times["memory"] == pytest.approx(1.322e-3, rel=1e-3)
    # At least the 528 pairs of 4096 entries, three operations each, at 33.5e12 a second.
    assert times["float32"] > 3 * 528 * 4096 * tokens / 33.5e12
    forward = 32 * predict.forward_seconds(h100, model, tokens, predict.UTILISATION)
    assert times["memory"] + times["instructions"] < 0.03 * forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_subject_computes_what_it_says(dtype: torch.dtype) -> None:
    before, after = subjects.states(40, 96, dtype, "cpu")
    for subject in [subjects.ours("cpu"), *subjects.in_pytorch("cpu")]:
        assert subjects.check(subject, before, after) is None


def test_a_wrong_result_is_reported() -> None:
    before, after = subjects.states(40, 96, torch.float32, "cpu")
    good = subjects.in_pytorch("cpu")[0]

    def run(x, y):
        cosine, squared, absolute, peak = good.run(x, y)
        return cosine, squared * 1.01, absolute, peak

    wrong = subjects.check(subjects.Subject("bad", run, good.means, 1e-3), before, after)
    assert wrong is not None
    assert wrong.startswith("bad: squared_difference must be")


def results_of(medians: dict[str, float]) -> dict[str, object]:
    """A result file of pytest-benchmark with one scoring case for each name."""
    info = {"backend": "cpu", "hidden_size": 576, "dtype": "float32", "gb_per_second": 12.25,
            "fraction_of_limit": 0.75, "times_faster": {"eager": 30.0}, "wrong": []}  # fmt: skip
    cases = [
        {
            "name": f"test_large_update[{name}]", "fullname": f"x::{name}", "group": "g",
            "stats": {"median": median, "q1": 0.99 * median, "q3": 1.01 * median, "min": median,
                      "max": median, "rounds": 3},
            "extra_info": info,
        }
        for name, median in medians.items()
    ]  # fmt: skip
    return {"benchmarks": cases, "machine_info": {"machine": "some processor"}}


def test_comparison_names_what_got_slower() -> None:
    old = results_of({"a": 1.0, "b": 1.0, "gone": 1.0, "noisy": 1.0})
    new = results_of({"a": 1.04, "b": 1.2, "noisy": 1.2})
    new["benchmarks"][2]["stats"]["q1"] = 0.9  # its spread reaches the old one
    lines = report.compare(old, new)
    assert [line.partition(":")[0] for line in lines] == ["x", "x"]
    assert "b: 1.20 times slower" in lines[0]
    assert "gone: not measured any more" in lines[1]


def test_results_become_csv_table_and_plot(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_of({"a": 0.5})))
    command = [sys.executable, str(BENCHMARKS / "report.py"), "write", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| cpu | 576 | float32 | 12.2 | 0.75 | 30.0 |  |  |" in result.stdout
    rows = path.with_suffix(".csv").read_text().splitlines()
    assert rows[0] == "group,case,quantity,value"
    assert "g,test_large_update[a],times_faster.eager,30.0" in rows
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_other_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a JSON file of pytest-benchmark"):
        report.load(path)
