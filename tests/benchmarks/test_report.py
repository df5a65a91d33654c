"""The report of a suite: two results compared, tables, plot, and what is to be said against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import provenance
import pytest
import ratios
import report
from matplotlib.figure import Figure

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def results_of(medians: dict[str, float], **changed: object) -> dict[str, object]:
    """A result file of pytest-benchmark with one scoring case for each name."""
    times_faster = {
        "eager": 30.0,
        "eager, one pass": 20.0,
        "torch.compile": 4.0,
        "torch.compile, one pass": 2.5,
        "float32 cosine": 6.0,
    }
    ends = {"low": 0.5, "high": 1.5, "coverage": 0.97}
    info = {
        "backend": "cpu",
        "hidden_size": 576,
        "dtype": "float32",
        "gb_per_second": 12.25,
        "fraction_of_limit": 0.75,
        "times_faster": times_faster,
        "wrong": [],
        "seconds": 1e-5,
        "tokens": 16,
        "interval": {
            "fraction_of_limit": {"low": 0.7, "high": 0.8, "coverage": 0.96},
            "times_faster": {
                name: {end: value * ratio for end, value in ends.items()}
                for name, ratio in times_faster.items()
            },
        },
    }
    cases = [
        {
            "name": f"test_{kind}_update[{name}]",
            "fullname": f"x::{name}",
            "group": "g",
            "stats": {
                "median": median,
                "q1": 0.99 * median,
                "q3": 1.01 * median,
                "min": median,
                "max": median,
                "rounds": 3,
            },
            "extra_info": info,
        }
        for name, median in medians.items()
        for kind in (("small",) if name == "few" else ("large",))
    ]
    return {
        "benchmarks": cases,
        "machine_info": {"machine": "some processor"},
        "commit_info": {"id": 40 * "a", "dirty": False},
        **changed,
    }


def test_comparison_names_what_got_slower() -> None:
    old = results_of({"a": 1.0, "b": 1.0, "gone": 1.0, "noisy": 1.0, "limit": 1.0})
    new = results_of({"a": 1.04, "b": 1.2, "noisy": 1.2, "limit": 1.05})
    new["benchmarks"][2]["stats"]["q1"] = 0.9  # its spread reaches the old one
    lines = report.compare(old, new)
    assert [line.partition(":")[0] for line in lines] == ["x", "x"]
    assert "b: 1.20 times slower" in lines[0]
    assert "gone: not measured any more" in lines[1]


def test_commands_compare(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    old, new, other = (tmp_path / f"{name}.json" for name in ("old", "new", "other"))
    old.write_text(json.dumps(results_of({"a": 1.0, "b": 1.0})))
    new.write_text(json.dumps(results_of({"a": 1.05, "b": 2.5})))
    other.write_text("[]")
    slower = "x::b: 2.50 times slower (1e+03 ms before, 2.5e+03 ms now)\n"
    assert command("compare", old, new) == (1, slower, "")
    assert command("compare", new, old) == (0, "nothing got slower\n", "")
    assert command("compare", old, tmp_path / "none.json")[0] == 2
    code, printed, error = command("compare", other, old)
    assert (code, printed) == (2, "")
    assert error.startswith(f"{other} must be a JSON file of pytest-benchmark")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`report.py`: exit status, what it prints, what it says is wrong."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        code = report.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def write(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., Any]:
    """`report.py write` of results."""

    def run(results: dict[str, object], *more: object) -> tuple[int, str, str]:
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results))
        return command("write", path, *more)

    return run


def test_results_become_csv_table_and_plot(write: Callable[..., Any], tmp_path: Path) -> None:
    """Of two forms of the same the table has the faster; every ratio has its interval."""
    results = results_of({"a": 0.5, "few": 7.0})
    results["benchmarks"][0]["stats"]["data"] = [0.5, 0.5]
    code, printed, _ = write(results, "--output", tmp_path / "b.c")
    assert code == 0
    assert "some processor; commit aaaaaaaaaaaa, clean tree. Ratios: median" in printed
    assert "median] with probability 0.96 or more.\n" in printed
    assert (
        "| cpu | 576 | float32 | 12.2 | 0.75 [0.70, 0.80] | 20.0 [10.0, 30.0] | 2.50 [1.25, 3.75] "
        "| 6.00 [3.00, 9.00] |  |\n"
    ) in printed
    # The time and the ratio of one run, not the median of the other timer.
    assert "| 16 | 576 | float32 | 10.0 | 20.0 [10.0, 30.0] | 2.50 [1.25, 3.75] |" in printed
    kept = json.loads((tmp_path / "b.c.json").read_text())["benchmarks"]
    assert kept == results_of({"a": 0.5, "few": 7.0})["benchmarks"]  # without single times
    found = (tmp_path / "b.c.csv").read_text().splitlines()
    assert found[0] == "group,case,quantity,value"
    for line in (
        "times_faster.eager,30.0",
        "interval.fraction_of_limit.low,0.7",
        'times_faster.torch.compile, one pass",2.5',
        "interval.times_faster.float32 cosine.high,9.0",
    ):
        assert any(
            row.startswith("g,test_large_update[a],") and row.endswith(line) for row in found
        ), line
    assert "g,test_large_update[a],time.median,0.5" in found
    assert "g,test_large_update[a],wrong," in found
    assert (tmp_path / "b.c.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_a_suite_are_kept_with_its_origin(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(provenance, "keep", lambda *given, **named: kept.append((given, named)))
    made = {"commit": "c", "clean": True, "sources": {}, "machine": "another"}
    suite = {"quick": False, "missing": [], "origin": made, "command": "pytest benchmarks"}
    assert write(results_of({"a": 0.5}, suite=suite))[0] == 0
    files = [tmp_path / f"results.{kind}" for kind in ("json", "csv", "png")]
    origin = made | {"machine": "some processor"}
    named = {"command": "pytest benchmarks", "origin": origin}
    assert kept == [((files, report.SOURCES), named)]
    assert all(file.exists() for file in files)


def test_tables_of_a_suite() -> None:
    """Every kind of case with figures of its own; an interval where one is known."""

    def case(name: str, **info: object) -> dict[str, object]:
        return {"name": name, "extra_info": info}

    def ends(low: float, high: float) -> dict[str, float]:
        return {"low": low, "high": high, "coverage": 0.9}

    of = {"model": "m", "dtype": "bfloat16", "tokens": "8 x 512"}
    suite = {
        "machine_info": {"machine": "a machine"},
        "benchmarks": [
            case(
                "test_all_blocks[m]",
                **of,
                seconds={"ours": 0.0123},
                share_of_forward={"float32": 0.5, "bfloat16": 0.0456},
                times_faster={"eager": 3.0, "batched matmul": 2.0, "compiled matmul": 1.5},
                interval={
                    "share_of_forward": {"bfloat16": ends(0.04, 0.05)},
                    "times_faster": {"batched matmul": ends(1.9, 2.1)},
                },
            ),
            case(
                "test_calibration_pass[m]",
                **of,
                ratio_to_bare={
                    "ours": 1.0123,
                    "hidden states and cosine": 1.2,
                    "float32 lists": 1.5,
                },
                interval={"ratio_to_bare": {"ours": ends(1.0, 1.02)}},
            ),
            case(
                "test_pruned_inference[m]",
                removed=7,
                num_layers=30,
                speedup={"prefill": 1.21, "decode": 1.27},
                ideal={"prefill": 1.25, "decode": 1.3},
                interval={"speedup": {"decode": ends(1.26, 1.28)}},
            ),
        ],
    }
    assert report.table(suite).splitlines() == [
        f"a machine; commit unknown, **with uncommitted changes**. Ratios: {ratios.METHOD} with "
        "probability 0.90 or more.",
        "",
        "| backend | hidden size | dtype | GB/s | of a pure read | × eager | × torch.compile "
        "| × float32 cosine | × block influence |",
        "|---|---|---|---|---|---|---|---|---|",
        "",
        "| tokens | hidden size | dtype | update, µs | × eager | × torch.compile |",
        "|---|---|---|---|---|---|",
        "",
        "| all blocks | ours, ms | × eager | × batched matmul | × compiled matmul "
        "| of its forward |",
        "|---|---|---|---|---|---|",
        "| m, bfloat16, 8 x 512 | 12.3 | 3.00 | 2.00 [1.90, 2.10] | 1.50 | 4.56% [4.00%, 5.00%] |",
        "",
        "| calibration pass | ours | hidden states and cosine | float32 lists |",
        "|---|---|---|---|",
        "| m, bfloat16, 8 x 512 | 1.012 [1.000, 1.020] | 1.200 | 1.500 |",
        "",
        "| layers removed | prefill | ideal | decode | ideal |",
        "|---|---|---|---|---|",
        "| 7 of 30 | 1.21 | 1.25 | 1.27 [1.26, 1.28] | 1.30 |",
    ]


def test_what_is_plotted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shares on the left, the faster form of what is slower on the right, in order of the cases."""
    results = results_of({"a": 1.0, "b": 1.0, "c": 1.0})
    for case, size, share in zip(
        results["benchmarks"], (64, 576, 4096), (0.5, 0.75, 1), strict=True
    ):
        case["extra_info"] = case["extra_info"] | {"hidden_size": size, "fraction_of_limit": share}
    without = dict(results["benchmarks"][2]["extra_info"]["times_faster"])
    del without["torch.compile"], without["torch.compile, one pass"]
    results["benchmarks"][2]["extra_info"] |= {"dtype": "float16", "times_faster": without}
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    report.plot(results, tmp_path / "x.png")
    left, right = figures[0].axes

    def drawn(axes: Any) -> dict[str, tuple[list[Any], list[Any]]]:
        return {
            str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
            if not str(line.get_label()).startswith("_")
        }

    assert drawn(left) == {
        "cpu, float32": (["64", "576"], [0.5, 0.75]),
        "cpu, float16": (["4096"], [1]),
    }
    assert drawn(right) == {
        "eager, float32": (["64", "576"], [20, 20]),
        "torch.compile, float32": (["64", "576"], [2.5, 2.5]),
        "eager, float16": (["4096"], [20]),
    }
    assert [list(line.get_ydata()) for line in left.lines][-1] == [1, 1]  # the limit
    assert (left.get_ylim()[0], right.get_yscale()) == (0, "log")
    assert figures[0].get_suptitle() == "some processor"


def test_what_is_to_be_said_against_results_is_said(write: Callable[..., Any]) -> None:
    suite = {"quick": False, "missing": ["test_all_blocks[float32]"]}
    dirty = {"id": 40 * "b", "dirty": True}
    told = report.origin(results_of({"a": 0.5}, commit_info=dirty, suite=suite))
    assert "commit bbbbbbbbbbbb, **with uncommitted changes**" in told
    assert "**not complete, 1 missing: test_all_blocks[float32]**" in told
    quick = results_of({"a": 0.5}, suite={"quick": True, "missing": []})
    assert "**tiny cases" in report.origin(quick)
    code, printed, error = write(quick, "--output", provenance.RESULTS / "suite-quick")
    assert (code, printed, list(provenance.RESULTS.glob("suite-quick*"))) == (2, "", [])
    assert "tiny cases: no result" in error


@pytest.mark.model
def test_the_suite_runs_and_its_results_are_right(tmp_path: Path) -> None:
    """Tiny cases of everything that `make bench` times, each checked before it is timed."""
    path = tmp_path / "suite.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCHMARKS),
        "--quick",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--benchmark-json={path}",
    ]
    # A worker's variables would switch its benchmarks off.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=own)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    results = report.load(path)
    cases = results["benchmarks"]
    suite, origin = results["suite"], results["suite"]["origin"]
    assert (suite["quick"], suite["cases"], suite["missing"]) == (True, len(cases), [])
    assert suite["command"] == "pytest benchmarks --quick --benchmark-only -q -p no:cacheprovider"
    assert origin["sources"] == {name: provenance.digest(name) for name in report.SOURCES}
    commit = {"id": origin["commit"], "dirty": not origin["clean"]}
    assert results["commit_info"] == commit
    files = {case["fullname"].partition("::")[0] for case in cases}
    assert files == {f"benchmarks/{file.name}" for file in BENCHMARKS.glob("test_*.py")}
    assert {case["name"]: case["extra_info"].get("wrong", []) for case in cases} == {
        case["name"]: [] for case in cases
    }
    named: dict[str, set[str]] = {}
    for case in cases:
        info = case["extra_info"]
        for quantity in (
            "fraction_of_limit",
            "times_faster",
            "ratio_to_bare",
            "share_of_forward",
            "speedup",
        ):
            if quantity in info:
                found = dict(report.flatten("x", info[quantity]))
                ends = dict(report.flatten("x", info["interval"][quantity]))
                for name, ratio in found.items():
                    assert 0 < ends[f"{name}.low"] <= ratio <= ends[f"{name}.high"]
                named.setdefault(case["name"].partition("[")[0], set()).update(found)
    forms = {
        f"x.{name}"
        for name in (
            "eager",
            "eager, one pass",
            "torch.compile",
            "torch.compile, one pass",
            "float32 cosine",
            "block influence",
        )
    }
    assert named["test_large_update"] == {"x", *forms} == named["test_small_update"]
    assert named["test_pruned_inference"] == {"x.prefill", "x.decode"}
    assert {"x.ours", "x.float32 lists"} < named["test_calibration_pass"]
    assert {"x.compiled matmul", "x.bfloat16"} < named["test_all_blocks"]


def test_what_a_suite_lacks_is_in_its_results(tmp_path: Path) -> None:
    """Cases that are left out by name, and files that were not asked for."""
    path = tmp_path / "part.json"
    case = "test_small_update[cpu-1-576-float32]"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCHMARKS / "test_scoring.py"),
        "--quick",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu-1-576-float32",
        f"--benchmark-json={path}",
    ]
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=own)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    results = report.load(path)
    assert [found["name"] for found in results["benchmarks"]] == [case]
    missing = results["suite"]["missing"]
    assert {"test_blocks.py", "test_small_update[cpu-1-576-bfloat16]"} < {*missing}
    assert case not in missing
    assert "test_scoring.py" not in missing


@pytest.mark.parametrize("content", ["{}", "[]", '{"benchmarks": []}', '{"machine_info": {}}'])
def test_other_json_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a JSON file of pytest-benchmark"):
        report.load(path)
