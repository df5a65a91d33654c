"""Everything that only a GPU can tell, in some minutes: PATH.json and PATH.md grow as it goes.

    make gpu-check
    python benchmarks/gpu_check.py            # whatever Python, torch and Triton are there
    python benchmarks/gpu_check.py --only update blocks --minutes 4

The most important comes first, every result is checked before it is timed and kept at once, and
what there was no time or no package for is named at the end. Times are the device's own, by replay
of CUDA graphs on cold buffers; the limit is a pure read of the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import read_limit
import torch
from gpu import ROOT, blocks, model, programs, tables, updates
from gpu.steps import OutOfTimeError, Record, Result, Settings, Step, run_all

from simdiff.io.machine import describe_machine
from simdiff_kernels.backends import usable_backends

# A step that began in time may go on for so long.
GRACE_SECONDS = 20


def all_steps(settings: Settings) -> list[Step]:
    """In the order of measuring, the most important first."""
    peers = updates.peer_steps(settings)
    return [
        *updates.steps(settings),
        *blocks.steps(settings),
        *model.steps(settings),
        *peers[:1],
        *programs.test_steps(settings),
        *programs.sanitizer_steps(settings),
        *peers[1:],
        *programs.demo_steps(settings),
    ]


def describe(settings: Settings, commit: str | None) -> Result:
    """What a reader needs to know of the machine and of what ran on it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if importlib.util.find_spec("triton") is not None:  # also called pytorch-triton
        versions["triton"] = importlib.import_module("triton").__version__
    versions |= {"cuda of torch": torch.version.cuda or "none", "nvcc": nvcc_release()}
    machine: Result = {"name": describe_machine(), "machine": describe_machine()}
    if settings.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine["name"] = gpu.name
        machine["gpu"] = {
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
        }
    return {
        **machine,
        "device": settings.device,
        "quick": settings.quick,
        "backends": settings.backends,
        "versions": versions,
        "commit": commit or git_commit(),
        "limit": read_limit.how_it_reads(settings.device),
    }


def nvcc_release() -> str:
    """Of the nvcc that compiles the reads."""
    nvcc = read_limit.find_nvcc()
    if nvcc is None:
        return "none"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return told.partition("release ")[2].partition(",")[0] or "unknown"


def git_commit() -> str:
    """What is checked out, and whether files of it were changed; unknown without git."""
    found = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            result = subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True
            )
        except OSError:
            return "unknown"
        if result.returncode:
            return "unknown"
        found.append(result.stdout.strip())
    return found[0] + (" and changes" if found[1] else "")


def stop_at(seconds: float) -> None:
    """Raise `OutOfTimeError` wherever the program is then."""

    def over(number: int, frame: object) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if everything that ran was right, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, on any machine")
    parser.add_argument("--minutes", type=float, default=8, help="for all together")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="update, blocks, model, peers, tests, compute-sanitizer, demo",
    )
    parser.add_argument(
        "--go-on", action="store_true", help="keep the other parts that the output has already"
    )
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "gpu",
        help="without suffix: .json and .md are written",
    )
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        print("gpu-check needs a CUDA GPU, and none is visible: nothing was run", file=sys.stderr)
        return 2
    start = time.monotonic()
    ours = tuple(name for name in usable_backends(device) if name != "reference")
    settings = Settings(device, options.quick, ours)
    chosen = [s for s in all_steps(settings) if options.only is None or s.part in options.only]
    if not chosen or not ours:
        what = "--only must name a part" if ours else "no backend is built for this device"
        print(f"gpu-check: {what}", file=sys.stderr)
        return 2
    record = Record(options.output, describe(settings, options.commit), tables.markdown)
    if options.go_on:
        try:
            again = {step.part for step in chosen}
            record.go_on(again | (model.RESULTS if "model" in again else set()))
        except (OSError, ValueError) as error:
            print(f"gpu-check: --go-on: {error}", file=sys.stderr)
            return 2
    stop_at(60 * options.minutes + GRACE_SECONDS)
    with contextlib.suppress(OutOfTimeError):  # else it ends a step, and all that follow
        run_all(chosen, record, start + 60 * options.minutes)
    signal.setitimer(signal.ITIMER_REAL, 0)
    record.finish(time.monotonic() - start)
    print(tables.markdown(record.content))
    return int(tables.anything_wrong(record.content["results"]))


if __name__ == "__main__":
    sys.exit(main())
