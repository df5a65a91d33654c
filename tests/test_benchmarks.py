"""The benchmarks' own logic on tiny cases: results are checked, wrong ones are not timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu_page
import predict
import pytest
import report
import subjects
import timing
import torch
from torch._inductor import metrics as inductor

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


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def subjects_on_cpu() -> list[subjects.Subject]:
    return [
        subjects.ours("cpu"),
        subjects.row_sums("cpu"),
        *subjects.in_pytorch("cpu"),
        *subjects.one_pass("cpu")[:1],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_subject_computes_what_it_says(dtype: torch.dtype) -> None:
    before, after = subjects.states(40, 96, dtype, "cpu")
    for subject in subjects_on_cpu():
        assert subjects.check(subject, before, after) is None


def altered(value: object, factor: float, index: int) -> object:
    """The result of a subject with one of its sums, of the metric `index`, times a factor."""
    if isinstance(value, torch.Tensor):  # four sums of a token
        factors = torch.ones(4)
        factors[index] = factor
        return value * factors
    assert isinstance(value, tuple)
    return tuple(v * factor if i == index else v for i, v in enumerate(value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_results_are_reported(dtype: torch.dtype) -> None:
    """Everything is off by 1% or nothing; a cosine in the states' dtype only where that tells it.

    Of a cosine near 1, seven roundings are 7 * 2^-8 in bfloat16 at most, half of the distance of
    0.05, 7 * 2^-11 in float16 and nothing to speak of in float32.
    """
    before, after = subjects.states(40, 96, dtype, "cpu")
    for subject in subjects_on_cpu()[1:]:
        sums = subject.run(before, after)
        count = 1 if isinstance(sums, tuple) and len(sums) == 1 else 3
        told = 0.01
        if subject.name == "block influence":
            told = {torch.float32: 0.01, torch.float16: 0.08, torch.bfloat16: 0.6}[dtype]
        for index in range(count):
            for factor in (0.0, 1 - told, 1 + told):
                wrong = altered(sums, factor, index)
                bad = replace(subject, name="bad", run=lambda x, y, wrong=wrong: wrong)
                found = subjects.check(bad, before, after)
                assert found is not None
                assert re.match("bad: (cosine_dist|squared_diff|absolute_diff)", found)


def test_compiled_subjects_are_compiled() -> None:
    """What torch.compile leaves to eager PyTorch makes no kernel of its own."""
    before, after = subjects.states(40, 96, torch.float32, "cpu")
    compiled = [s for s in (*subjects.in_pytorch("cpu"), *subjects.one_pass("cpu"))
                if s.name.startswith("torch.compile")]  # fmt: skip
    assert len(compiled) == 3
    for subject in compiled:
        torch._dynamo.reset()
        inductor.reset()
        subject.run(before, after)
        assert inductor.generated_kernel_count > 0, subject.name
    for subject in subjects.in_pytorch("cpu", compile_too=False):
        inductor.reset()
        subject.run(before, after)
        assert inductor.generated_kernel_count == 0, subject.name


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[..., None]:
        """A call that takes so long at first, then, ...; the last goes on."""
        left = list(seconds)

        def call(*_: object) -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_interleaved_times_are_those_of_each_call(clock: Clock) -> None:
    """The first call of each warms up; the machine gets slower, which drifts for all alike."""
    runs = {"ours": clock.taking(50, 1, 2, 4), "eager": clock.taking(90, 3, 6, 12)}
    assert timing.interleaved(runs, "cpu", 3) == {"ours": [1, 2, 4], "eager": [3, 6, 12]}
    assert clock.now == 140 + 7 + 21


def test_rounds_take_turns(clock: Clock) -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timing.interleaved(runs, "cpu", 2)
    assert "".join(calls) == "ab" + "abab"


def test_seconds_of_a_call_on_cold_pairs(clock: Clock) -> None:
    """Two calls warm up, each repeat runs all three pairs: means 2, 4, 30, and their median."""
    pair = (torch.ones(1), torch.ones(1))
    run = clock.taking(100, 100, 1, 2, 3, 4, 4, 4, 10, 20, 60)
    assert timing.device_seconds(run, [pair] * 3, "cpu", repeats=3) == 4
    run = clock.taking(100, 2, 2, 5, 5, 3, 3)
    assert timing.host_seconds(run, pair, "cpu", calls=2) == 3


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


@pytest.mark.model
def test_the_suite_runs_and_its_results_are_right(tmp_path: Path) -> None:
    """Tiny cases of everything that `make bench` times, each checked before it is timed."""
    path = tmp_path / "suite.json"
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--quick", "--benchmark-only",
               "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"]  # fmt: skip
    # A worker's variables would switch its benchmarks off.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=own)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    cases = report.load(path)["benchmarks"]
    files = {case["fullname"].partition("::")[0] for case in cases}
    assert files == {f"benchmarks/{file.name}" for file in BENCHMARKS.glob("test_*.py")}
    assert {case["name"]: case["extra_info"].get("wrong", []) for case in cases} == {
        case["name"]: [] for case in cases
    }
    for case in cases:
        for name, times in case["extra_info"].get("times_faster", {}).items():
            assert times > 0, (case["name"], name)


def test_other_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a JSON file of pytest-benchmark"):
        report.load(path)
