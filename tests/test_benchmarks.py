"""The benchmarks' own logic on tiny cases: results are checked, wrong ones are not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_page
import predict
import pytest
import report
import subjects
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("name", "document"),
    [("measured", gpu_page.document), ("predicted", predict.document)],
)
def test_the_page_of_gpus_is_what_its_scripts_write(name: str, document: Callable[[], str]) -> None:
    page = gpu_page.PAGE.read_text()
    assert gpu_page.section(page, name) == document()
    assert gpu_page.with_section(page, name, document()) == page
    assert gpu_page.section(gpu_page.with_section(page, name, "other\n"), name) == "other\n"
    with pytest.raises(ValueError, match="gpu.md: must hold .* once"):
        gpu_page.section(page.replace(f"<!-- {name}: end -->", ""), name)


def test_every_measured_case_is_on_the_page() -> None:
    page, content = gpu_page.document(), gpu_page.measured()
    for case in content["updates"]:
        shares = " | ".join(f"{case['share_of_read'][key]:.2f}" for key in ("cuda", "triton"))
        row = f"| {case['dtype']} | {case['hidden_size']} | {case['num_tokens']} | "
        assert f"{row}{case['read_microseconds']:g} | {shares} |" in page
        # A read moves both states: at the limit, or below it where there is little to read.
        size = {"float32": 4}.get(case["dtype"], 2) * case["hidden_size"] * case["num_tokens"]
        rate = 2 * size / (1e-6 * case["read_microseconds"])
        assert rate <= 1.02 * content["limits"]["read_bytes_per_second"]
    assert content["commit"] in page
    assert content["date"] in page


def test_figures_of_a_gpu_in_the_readme_were_measured() -> None:
    readme = " ".join((BENCHMARKS.parent / "README.md").read_text().split())
    content = gpu_page.measured()
    rates = content["gigabytes_per_second"][0]
    speed, costs = content["inference"], content["calibration_pass"]["share_of_forward"]
    for text in (
        f"commit {content['commit']}",
        f"{rates['cuda']} GB/s (`cuda`) and {rates['triton']} GB/s (`triton`)",
        f"torch.compile reaches {rates['torch.compile']} GB/s, with max-autotune "
        f"{rates['torch.compile, max-autotune']}, eager PyTorch {rates['eager']}",
        f"{100 * costs[1]['cuda']:.3g}% longer where its layers are scored, "
        f"{100 * costs[2]['cuda']:.3g}% (`triton`: {100 * costs[2]['triton']:.3g}%) with all",
        f"{speed['graphs']['pruned']} tokens/s instead of {speed['graphs']['dense']}",
        f"{speed['graphs']['ratio']} times as many, and prefills {speed['prefill_ratio']} times",
        f"by bytes the ideal is {speed['graphs']['ideal_by_bytes']}",
    ):
        assert text in readme


def test_predictions_are_by_bytes_and_by_rates() -> None:
    reached = predict.Reached.of(gpu_page.measured())
    # LLaMA-3.1-8B: 218 M parameters a layer, two flops each, and attention over 1024 positions.
    flops = predict.MODEL.layer_flops(2048)
    assert flops == pytest.approx(2 * 218.1e6 + 4 * 1024 * 4096, rel=1e-3)
    assert reached.peak == pytest.approx(32 * 16384 * flops / 0.465 / 989e12)
    h100, b300 = predict.GPUS[2], predict.GPUS[4]
    found = predict.predict(h100, reached)
    # 16384 tokens of 2 x 4096 bfloat16 entries: 268 MB at 3.35 TB/s.
    assert found.read == pytest.approx(80.1e-6 / reached.read, rel=1e-2)
    assert found.seconds == pytest.approx(found.read / reached.kernel)
    assert {predict.predict(gpu, reached).binds for gpu in predict.GPUS} == {"memory"}
    # 32 pairs of entries to 4 vectors: 8 instructions of a unit that gives two results a clock.
    seconds = predict.floors(b300, predict.ROW_SUMS, 32e6)["float64"]
    assert seconds == pytest.approx(8e6 / 2 / (148 * 1.965e9))
    # Float64 for every entry: 5 operations and 2 conversions for a pair.
    seconds = predict.floors(b300, predict.FLOAT64, 1e6)["float64"]
    assert seconds == pytest.approx(7e6 / 2 / (148 * 1.965e9))


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
