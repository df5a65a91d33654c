"""The benchmarks' own logic on tiny cases: results are checked, wrong ones are not timed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_page
import predict
import provenance
import pytest
import ratios
import report
import subjects
import timing
import torch
from matplotlib.figure import Figure
from torch._inductor import metrics as inductor

from simdiff_kernels.testing import exact_metrics

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


def test_figures_of_a_gpu_beside_the_others_were_measured() -> None:
    page = " ".join((BENCHMARKS.parent / "docs" / "figures.md").read_text().split())
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
        assert text in page


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
    compiled = [s for s in subjects.in_pytorch("cpu") if s.name.startswith("torch.compile")]
    assert [s.name for s in compiled] == ["torch.compile, one pass", "torch.compile"]
    for subject in compiled:
        torch._dynamo.reset()
        inductor.reset()
        subject.run(before, after)
        assert inductor.generated_kernel_count > 0, subject.name
    for subject in subjects.in_pytorch("cpu", compile_too=False):
        inductor.reset()
        subject.run(before, after)
        assert inductor.generated_kernel_count == 0, subject.name


@pytest.mark.parametrize("token", [0, 255, 299])
def test_every_token_is_checked(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong token of 300, read in pieces of 64; what is exact may be known already."""
    monkeypatch.setattr(subjects, "_PIECE", 64 * 96)
    before, after = subjects.states(300, 96, torch.float32, "cpu")
    exact = subjects.exact_means(before, after)
    assert exact == pytest.approx(
        {
            name: value.mean().item()
            for name, value in exact_metrics(before, after)._asdict().items()
        },
        rel=1e-9,
    )
    ours = subjects.ours("cpu")

    def run(x: torch.Tensor, y: torch.Tensor) -> object:
        wrong = y.clone()
        wrong[:, token] *= 1.01
        return ours.run(x, wrong)

    bad = replace(ours, name="bad", run=run)
    assert "bad: " in str(subjects.check(bad, before, after))
    assert "bad: " in str(subjects.check(bad, before, after, exact))
    assert subjects.check(subjects.ours("cpu"), before, after, exact) is None


def cache(folder: Path, level: int, kind: str, size: str, shared: str) -> None:
    folder.mkdir(parents=True)
    for name, value in (("level", str(level)), ("type", kind), ("size", size),
                        ("shared_cpu_list", shared)):  # fmt: skip
        (folder / name).write_text(f"{value}\n")


def test_the_last_caches_are_read_from_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chiplets of two processors; of the last four only the caches of the usable ones count."""
    for number, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        caches = tmp_path / f"cpu{number}" / "cache"
        cache(caches / "index0", 1, "Data", "32K", str(number))
        cache(caches / "index2", 2, "Unified", "1M", str(number))
        cache(caches / "index3", 3, "Unified", "307200K", shared)
        cache(caches / "index4", 4, "Instruction", "2G", shared)
    cache(tmp_path / "cpu4" / "cache" / "index2", 2, "Unified", "512K", "4")
    (tmp_path / "cpu4" / "cache" / "index2" / "size").unlink()
    assert timing.last_caches(tmp_path, {0, 1}) == 300 << 20
    assert timing.last_caches(tmp_path, {1, 2}) == 600 << 20
    assert timing.last_caches(tmp_path, {0, 4}) == 300 << 20
    assert timing.last_caches(tmp_path, {4}) is None
    assert timing.last_caches(tmp_path / "none", {0}) is None
    monkeypatch.setattr(timing, "PROCESSORS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3}, raising=False)
    assert timing.cache_bytes("cpu") == 300 << 20
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert timing.cache_bytes("cpu") == 600 << 20
    monkeypatch.setattr(timing, "PROCESSORS", tmp_path / "none")
    assert timing.cache_bytes("cpu") == timing.UNKNOWN_CACHE_BYTES


@pytest.mark.parametrize("cache_mib", [32, 64, 300, 1152])
def test_no_pair_is_in_the_cache_when_it_is_read_again(
    cache_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its uses the others are read: four times the cache, at most one of them in excess."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: cache_mib << 20)
    monkeypatch.setattr(timing, "available_memory", lambda device: 64 << 30)
    size = 256 << 20
    pairs = timing.cold_pairs(lambda seed: (seed, seed), size, "cpu")
    assert [first for first, _ in pairs] == [*range(len(pairs))]
    others = (len(pairs) - 1) * size
    assert others >= 4 * cache_mib << 20
    assert others - size < 4 * cache_mib << 20
    monkeypatch.setattr(timing, "available_memory", lambda device: 2 * len(pairs) * size - 1)
    told = f"{len(pairs)} pairs of 256 MiB .* cache of {cache_mib} MiB: more than half of the "
    with pytest.raises(MemoryError, match=f"{told}{2 * len(pairs) * 256 - 1} MiB free$"):
        timing.cold_pairs(lambda seed: (seed, seed), size, "cpu")


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


def test_a_turn_of_several_calls_gives_their_mean(clock: Clock) -> None:
    runs = {"ours": clock.taking(50, 1, 2, 6, 2, 2, 8)}
    assert timing.interleaved(runs, "cpu", 2, calls=3) == {"ours": [3, 4]}


def test_ratios_are_those_of_the_rounds() -> None:
    """Nine rounds: between the second and the eighth of the ratios with probability 0.961."""
    below = [1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 1.0, 1.0, 10.0]
    times = [ratio * of for ratio, of in zip([5, 1, 9, 2, 8, 3, 7, 4, 6], below, strict=True)]
    found, intervals = ratios.of_rounds({"eager": times}, below)
    assert found == {"eager": 5}  # the ratio of the medians is 7
    assert intervals == {"eager": {"low": 2, "high": 8, "coverage": 1 - 2 * 10 / 512}}
    assert ratios.shown(5, intervals["eager"]) == "5.00 [2.00, 8.00]"
    assert ratios.shown(0.01234, {"low": 0.012, "high": 0.1}, "percent") == "1.23% [1.20%, 10.00%]"
    assert ratios.shown(31.25, {"low": 9.996, "high": 114.4}) == "31.2 [10.00, 114]"
    assert ratios.shown(10.0, {"low": 10.5, "high": 100.0}) == "10.0 [10.5, 100]"
    assert ratios.shown(1.0049, None, 3) == "1.005"
    assert ratios.shown(None, None) == ""


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


def test_the_limit_is_the_fastest_read(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (torch.ones(1), torch.zeros(1))
    reads = {"slow": clock.taking(8.0), "fast": clock.taking(2.0), "late": clock.taking(5.0)}

    def ways(device: str) -> dict[str, Callable[..., None]]:
        assert device == "cpu"
        return reads

    monkeypatch.setattr(timing.read_limit, "reads", ways)
    assert timing.pure_read([pair, pair], "cpu") == ("fast", 2)
    assert timing.limit_of([pair, pair], "cpu") is reads["fast"]
    del reads["slow"], reads["late"]
    before = clock.now
    assert timing.limit_of([pair], "cpu") is reads["fast"]
    assert clock.now == before  # the only one needs no time
    assert timing.copy_seconds([pair], "cpu") == 0
    assert pair[1].item() == 1


class Gpu:
    """A device whose time goes on in what it waits for and in what it is given to do."""

    def __init__(self, clock: Clock, *replays: float) -> None:
        self.clock, self.graphs, self.waits = clock, 0, 0
        self.work = clock.taking(*replays)

    def synchronize(self) -> None:
        self.waits += 1
        self.clock.now += 1000

    def _sleep(self, cycles: int) -> None:
        self.clock.now += 100

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.clock.now)
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=self.work)

    @contextlib.contextmanager
    def graph(self, graph: object, capture_error_mode: str) -> Iterator[None]:
        self.graphs += 1
        yield


def test_seconds_on_a_gpu_are_those_of_its_events(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of 5 rounds of 3 pairs, replayed once to warm up: 30, 60, 45 s, so 3 s a call."""
    gpu = Gpu(clock, 900, 30, 60, 45)
    monkeypatch.setattr(torch, "cuda", gpu)
    calls: list[int] = []
    pairs = [(torch.ones(1), torch.ones(1))] * 3
    seconds = timing.device_seconds(lambda x, y: calls.append(1), pairs, "cuda", repeats=3)
    assert (seconds, len(calls), gpu.graphs) == (3, 2 + 15, 1)
    runs = {"a": clock.taking(50, 1, 3), "b": clock.taking(90, 4, 8)}
    assert timing.interleaved(runs, "cuda", 2) == {"a": [1, 3], "b": [4, 8]}
    run = clock.taking(70, 2, 2, 5, 5, 3, 3)
    before = gpu.waits
    assert timing.host_seconds(run, pairs[0], "cuda", calls=2) == 3
    assert gpu.waits > before
    before = clock.now
    timing.finished(clock.taking(5), "cuda")()
    timing.finished(clock.taking(5), "cpu")()
    assert clock.now == before + 5 + 1000 + 5


def results_of(medians: dict[str, float], **changed: object) -> dict[str, object]:
    """A result file of pytest-benchmark with one scoring case for each name."""
    times_faster = {"eager": 30.0, "eager, one pass": 20.0, "torch.compile": 4.0,
                    "torch.compile, one pass": 2.5, "float32 cosine": 6.0}  # fmt: skip
    ends = {"low": 0.5, "high": 1.5, "coverage": 0.97}
    info = {"backend": "cpu", "hidden_size": 576, "dtype": "float32", "gb_per_second": 12.25,
            "fraction_of_limit": 0.75, "times_faster": times_faster, "wrong": [],
            "seconds": 1e-5, "tokens": 16,
            "interval": {
                "fraction_of_limit": {"low": 0.7, "high": 0.8, "coverage": 0.96},
                "times_faster": {
                    name: {end: value * ratio for end, value in ends.items()}
                    for name, ratio in times_faster.items()
                },
            }}  # fmt: skip
    cases = [
        {
            "name": f"test_{kind}_update[{name}]", "fullname": f"x::{name}", "group": "g",
            "stats": {"median": median, "q1": 0.99 * median, "q3": 1.01 * median, "min": median,
                      "max": median, "rounds": 3},
            "extra_info": info,
        }
        for name, median in medians.items()
        for kind in (("small",) if name == "few" else ("large",))
    ]  # fmt: skip
    return {"benchmarks": cases, "machine_info": {"machine": "some processor"},
            "commit_info": {"id": 40 * "a", "dirty": False}, **changed}  # fmt: skip


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
    for line in ("times_faster.eager,30.0", "interval.fraction_of_limit.low,0.7",
                 'times_faster.torch.compile, one pass",2.5',
                 "interval.times_faster.float32 cosine.high,9.0"):  # fmt: skip
        assert any(row.startswith("g,test_large_update[a],") and row.endswith(line)
                   for row in found), line  # fmt: skip
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
            case("test_all_blocks[m]", **of, seconds={"ours": 0.0123}, share_of_forward={
                "float32": 0.5, "bfloat16": 0.0456}, times_faster={
                "eager": 3.0, "batched matmul": 2.0, "compiled matmul": 1.5},
                interval={"share_of_forward": {"bfloat16": ends(0.04, 0.05)},
                          "times_faster": {"batched matmul": ends(1.9, 2.1)}}),
            case("test_calibration_pass[m]", **of, ratio_to_bare={
                "ours": 1.0123, "hidden states and cosine": 1.2, "float32 lists": 1.5},
                interval={"ratio_to_bare": {"ours": ends(1.0, 1.02)}}),
            case("test_pruned_inference[m]", removed=7, num_layers=30,
                 speedup={"prefill": 1.21, "decode": 1.27}, ideal={"prefill": 1.25, "decode": 1.3},
                 interval={"speedup": {"decode": ends(1.26, 1.28)}}),
        ],
    }  # fmt: skip
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

    assert drawn(left) == {"cpu, float32": (["64", "576"], [0.5, 0.75]),
                           "cpu, float16": (["4096"], [1])}  # fmt: skip
    assert drawn(right) == {"eager, float32": (["64", "576"], [20, 20]),
                            "torch.compile, float32": (["64", "576"], [2.5, 2.5]),
                            "eager, float16": (["4096"], [20])}  # fmt: skip
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
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--quick", "--benchmark-only",
               "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"]  # fmt: skip
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
        for quantity in ("fraction_of_limit", "times_faster", "ratio_to_bare", "share_of_forward",
                         "speedup"):  # fmt: skip
            if quantity in info:
                found = dict(report.flatten("x", info[quantity]))
                ends = dict(report.flatten("x", info["interval"][quantity]))
                for name, ratio in found.items():
                    assert 0 < ends[f"{name}.low"] <= ratio <= ends[f"{name}.high"]
                named.setdefault(case["name"].partition("[")[0], set()).update(found)
    forms = {f"x.{name}" for name in (
        "eager", "eager, one pass", "torch.compile", "torch.compile, one pass", "float32 cosine",
        "block influence",
    )}  # fmt: skip
    assert named["test_large_update"] == {"x", *forms} == named["test_small_update"]
    assert named["test_pruned_inference"] == {"x.prefill", "x.decode"}
    assert {"x.ours", "x.float32 lists"} < named["test_calibration_pass"]
    assert {"x.compiled matmul", "x.bfloat16"} < named["test_all_blocks"]


def test_what_a_suite_lacks_is_in_its_results(tmp_path: Path) -> None:
    """Cases that are left out by name, and files that were not asked for."""
    path = tmp_path / "part.json"
    case = "test_small_update[cpu-1-576-float32]"
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS / "test_scoring.py"), "--quick",
               "--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", "cpu-1-576-float32",
               f"--benchmark-json={path}"]  # fmt: skip
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
