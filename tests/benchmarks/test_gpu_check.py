"""gpu-check on tiny cases, without a GPU: results kept at once, bounds of time, what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
import subjects
import torch
from gpu import model, programs, tables, updates
from gpu.steps import LeftOutError, OutOfTimeError, Record, Result, Settings, Step, run_all

SCRIPT = Path(gpu_check.__file__)
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
QUICK = Settings("cpu", True, ("cpu",))
MACHINE = {
    "name": "some GPU",
    "machine": "m",
    "versions": {},
    "commit": "c",
    "limit": "l",
    "device": "cuda",
    "quick": False,
}


def run_script(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = os.environ | NO_GPU | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_whole_check_on_tiny_cases(tmp_path: Path) -> None:
    """Nothing is imported from where it is installed: the checkout alone serves."""
    only = ("update", "blocks", "model", "demo")
    result = run_script("--quick", "--output", tmp_path / "r", "--only", *only, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["complete"]
    parts = [entry["part"] for entry in content["results"]]
    assert parts == ["update", "update", "blocks", "blocks", "pass", "inference"]
    for entry in content["results"][:2]:
        for by_backend in entry["ours"].values():
            cpu = by_backend["cpu"]
            assert cpu["share"] == entry["read_seconds"] / cpu["seconds"]
            assert cpu["host_seconds"] > 0
    one = content["results"][4]
    assert set(one["share"]) == {"blocks off", "blocks on"}
    assert content["left_out"][0]["why"] == "it needs a GPU"
    page = (tmp_path / "r.md").read_text()
    assert page in result.stdout
    assert "no figure of a GPU" in page
    assert "| goal |" not in page  # nothing is judged without a GPU
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["r.json", "r.md"]


def test_packages_that_are_missing_are_named(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("rich", "transformers", "numpy", "pytest", "triton"):
    sys.modules[name] = None
sys.path[0] = {str(SCRIPT.parent)!r}
import gpu_check
sys.exit(gpu_check.main(["--quick", "--only", "update", "model", "--output", "r"]))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | NO_GPU
    )
    assert result.returncode == 0, result.stderr
    assert "left out: the package transformers is not installed" in result.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert [entry["part"] for entry in content["results"]] == ["update", "update"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = run_script("--output", tmp_path / "r")
    assert result.returncode == 2
    assert "needs a CUDA GPU, and none is visible" in result.stderr
    assert list(tmp_path.iterdir()) == []


def measured(case: str, share: float, backend: str = "cuda") -> Result:
    """What a step of updates gives on a GPU."""
    found = {backend: {"seconds": 1e-5 / share, "share": share, "host_seconds": 2e-6}}
    return {
        "part": "update",
        "case": case,
        "bytes": 1 << 20,
        "read_seconds": 1e-5,
        "copy_seconds": 2e-5,
        "ours": {"row_sums": found},
    }


def test_each_result_is_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    seen = []

    def stored() -> Result:
        return json.loads((tmp_path / "r.json").read_text())

    def two(left: object) -> Iterator[Result]:
        yield measured("bf16 8192 x 4096", 0.95)
        seen.append(len(stored()["results"]))
        raise RuntimeError("the device is gone")

    def one(left: object) -> Iterator[Result]:
        seen.append(len(stored()["results"]))
        assert "It has not ended" in (tmp_path / "r.md").read_text()
        yield measured("bf16 2048 x 4096", 0.5)

    record = Record(tmp_path / "r", MACHINE, tables.markdown)
    chosen = [Step("update", "first", 0, two), Step("update", "second", 0, one)]
    run_all(chosen, record, time.monotonic() + 60)
    record.finish(1.0)
    assert seen == [1, 2]  # what failed is a result too
    assert stored()["results"][1]["failed"] == "RuntimeError: the device is gone"
    page = (tmp_path / "r.md").read_text()
    assert "first FAILED: RuntimeError: the device is gone" in page
    assert "bf16 8192 x 4096: share of the read | ≥ 0.93 | 0.95 | yes |" in page
    assert "bf16 2048 x 4096: share of the read | ≥ 0.88 | 0.5 | NO |" in page
    assert "bf16 512 x 4096: share of the read | ≥ 0.82 |  | not measured |" in page


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    record = Record(tmp_path / "r", MACHINE, tables.markdown)

    def slow(left: object) -> Iterator[Result]:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(5)
        yield {}

    def no_package(left: object) -> Iterator[Result]:
        raise LeftOutError("the package x is not installed")
        yield {}

    def short(left: object) -> Iterator[Result]:
        yield {"errors": 0, "warnings": 0}

    chosen = [
        Step("peers", "long", 100, short),
        Step("demo", "d", 1, no_package),
        Step("compute-sanitizer", "memcheck", 1, short),
        Step("peers", "hangs", 1, slow),
    ]

    def over(number: int, frame: object) -> None:
        raise OutOfTimeError

    earlier = signal.signal(signal.SIGALRM, over), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        run_all(chosen, record, time.monotonic() + 30)
    finally:
        signal.signal(signal.SIGALRM, earlier[0])
        signal.setitimer(signal.ITIMER_REAL, *earlier[1])
    assert [entry["case"] for entry in record.content["results"]] == ["memcheck"]
    why = {entry["case"]: entry["why"] for entry in record.content["left_out"]}
    assert why["long"].startswith("it takes about 100 s, ")
    assert why["d"] == "the package x is not installed"
    assert why["hangs"] == "the time was over before it ended"
    page = (tmp_path / "r.md").read_text()
    assert all(f"{case}: left out: {reason}" in page for case, reason in why.items())


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = subjects.ours

    def off(backend: str) -> subjects.Subject:
        good = right(backend)

        def means(result: object, num_tokens: int) -> dict[str, float]:
            found = good.means(result, num_tokens)
            return found | {"squared_difference": 1.001 * found["squared_difference"]}

        return replace(good, means=means)

    monkeypatch.setattr(subjects, "ours", off)
    (result,) = updates.steps(QUICK)[0].run(lambda: 60.0)
    found = result["ours"]["update"]["cpu"]
    assert set(found) == {"wrong"}
    entry = {"part": "update", "case": "x", **result}
    assert tables.anything_wrong([entry])
    page = tables.markdown({**MACHINE, "results": [entry], "left_out": []})
    assert "WRONG, not timed: cpu: squared_difference must be" in page


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.001, True)])
def test_sums_of_tokens_are_checked(
    factor: float, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row_sums(before, after, mask=None, *, out=None, backend=None):
        x, y = before.double(), after.double()
        d = y - x
        squares = [z.square().sum(-1) for z in (x, y, d)]
        return torch.stack([*squares, factor * d.abs().sum(-1)], -1)

    monkeypatch.setattr(subjects.simdiff_kernels, "row_sums", row_sums, raising=False)
    (result,) = updates.steps(QUICK)[0].run(lambda: 60.0)
    assert ("wrong" in result["ours"]["row_sums"]["cpu"]) == wrong


def test_the_pass_is_compared_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from simdiff.scoring import calibration_pass

    right, asked = calibration_pass.score, []

    def other(model, batches, *, backend=None, **keywords):
        asked.append(backend)
        return right(model, [batches[0] + (backend is None)], backend=backend, **keywords)

    monkeypatch.setattr(calibration_pass, "score", other)
    small = model.build(model.SMALL, "cpu")
    result = model.measure_pass(small, QUICK)
    assert asked == [None, "reference"]
    assert "relative error" in result["wrong"]
    assert "seconds" not in result


def test_a_goal_is_not_met_by_what_did_not_end() -> None:
    def met(name: str, *results: Result) -> str:
        (goal,) = (g for g in tables.goals(list(results)) if g.name.startswith(name))
        return goal.met

    tools = [
        {"part": "compute-sanitizer", "case": tool, "errors": 0, "warnings": 0}
        for tool in programs.TOOLS
    ]
    assert met("compute-sanitizer", *tools) == "yes"
    assert met("compute-sanitizer", *tools[:2]) == "not measured"
    assert met("compute-sanitizer", tools[0], tools[1] | {"warnings": 6}) == "NO"
    tests = {"part": "tests", "case": "t", "ended": True, "passed": 3, "failed_tests": []}
    assert met("tests", tests) == "yes"
    assert met("tests", tests, tests | {"ended": False}) == "not measured"
    assert met("tests", tests, tests | {"ended": False, "failed_tests": ["x"]}) == "NO"
    shapes = [measured("bf16 8192 x 4096", 0.95), measured("bf16 8192 x 4096", 0.91, "triton")]
    shapes[0]["ours"]["row_sums"] |= shapes[1]["ours"]["row_sums"]
    assert met("row_sums, triton", shapes[0]) == "yes"
    shapes[0]["ours"]["row_sums"]["triton"]["share"] = 0.89
    assert met("row_sums, triton", shapes[0]) == "NO"


def test_what_other_programs_say_is_counted() -> None:
    done = "every operator has run\n========= "
    racecheck = done + "RACECHECK SUMMARY: 6 hazards displayed (0 errors, 6 warnings)\n"
    assert programs.count_faults("racecheck", 0, racecheck) == {"errors": 0, "warnings": 6}
    memcheck = done + "ERROR SUMMARY: 3 errors\n"
    assert programs.count_faults("memcheck", 0, memcheck) == {"errors": 3, "warnings": 0}
    died = programs.count_faults("memcheck", 1, "no such device\n========= ERROR SUMMARY: 0 errors")
    assert "no such device" in died["failed"]
    with pytest.raises(LeftOutError, match="the time was over"):
        programs.count_faults("memcheck", None, "")
    text = """
tests/kernels/test_gpu.py::test_a[cuda] PASSED                                   [ 25%]
tests/kernels/test_gpu.py::test_a[triton] FAILED                                 [ 50%]
tests/kernels/test_gpu.py::test_b SKIPPED (needs two GPUs)                       [ 75%]
tests/kernels/test_gpu.py::test_c ERROR                                          [100%]
ERROR tests/kernels/test_x.py - ImportError
"""
    assert programs.count_tests(text) == {
        "passed": 1,
        "skipped": 1,
        "failed_tests": [
            "tests/kernels/test_gpu.py::test_a[triton]",
            "tests/kernels/test_gpu.py::test_c",
            "tests/kernels/test_x.py",
        ],
    }
    names = {Path(path).name for path in programs.files_of_tests()}
    wanted = {"test_gpu.py", "test_running.py", "test_blocks.py", "test_decoding.py"}
    assert wanted | {"test_streamed.py"} <= names


def test_tests_that_are_shared_out_are_counted() -> None:
    text = """
tests/kernels/test_a.py::test_b[cuda]
[gw0] [ 50%] PASSED tests/kernels/test_a.py::test_b[cuda]
[gw1] [100%] FAILED tests/kernels/test_a.py::test_c[a b-triton] \n"""
    found = programs.count_tests(text)
    assert found["passed"] == 1
    assert found["failed_tests"] == ["tests/kernels/test_a.py::test_c[a b-triton]"]


def test_a_record_goes_on(tmp_path: Path) -> None:
    """Parts that are run again replace their results; another commit is refused."""
    path = tmp_path / "r"
    record = Record(path, MACHINE, lambda content: "")
    for part in ("update", "blocks"):
        record.add(Step(part, "one", 0, lambda left: []), 1.0, {})
    record.finish(1.0)
    later = Record(path, MACHINE, lambda content: "")
    later.go_on({"update"})
    assert [entry["part"] for entry in later.content["results"]] == ["blocks"]
    with pytest.raises(ValueError, match="another run: commit differ"):
        Record(path, MACHINE | {"commit": "d"}, lambda content: "").go_on({"update"})


def test_what_tells_no_time_runs_at_once(tmp_path: Path) -> None:
    """Each of three waits until all have begun; what is timed runs alone."""
    barrier, running = threading.Barrier(3, timeout=30), []

    def waits(left: object) -> Iterator[Result]:
        barrier.wait()
        yield {}

    def alone(left: object) -> Iterator[Result]:
        running.append(threading.active_count())
        yield {}

    before = threading.active_count()
    record = Record(tmp_path / "r", MACHINE, lambda content: "")
    steps = [Step("tests", str(n), 0, waits, timed=False) for n in range(3)]
    run_all([*steps, Step("update", "a", 0, alone)], record, time.monotonic() + 60)
    assert sorted(entry["case"] for entry in record.content["results"]) == ["0", "1", "2", "a"]
    assert running == [before]
