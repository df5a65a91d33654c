"""Scoring on a GPU against copies, PyTorch and peers; writes one JSON and one Markdown table.

    make gpu-check          # the GPU tests, then this

Each case is checked against float64 before it is timed; a wrong result is reported and not timed.
Buffers are cold. GB/s counts what scoring must read; the limit is a device-to-device copy in the
same run, which counts what it reads and writes. The last tables are what hooks add to a forward,
and what all blocks of layers cost beside one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_blocks
import subjects
import timing
import torch

from simdiff.machine import describe_machine
from simdiff.progress import track
from simdiff.scores import feed_forward
from simdiff_kernels import RunningScores, backend_status

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What an H100 or A100 must reach, for hidden states that fill the memory system.
GOALS = {
    "of copy from 8192 tokens up": 0.92,
    "x torch.compile": 1.3,
    "x eager": 8.0,
    "share of a LLaMA forward": 0.01,
    "share of a LLaMA forward, all blocks": 0.03,
}


@dataclass
class Settings:
    """What is measured: everything on a GPU, a corner of it with --quick."""

    device: str
    hidden_sizes: tuple[int, ...] = (576, 1024, 2048, 4096, 5120, 8192, 16384)
    tokens: tuple[int, ...] = (1, 16, 128, 1024, 4096, 8192, 32768, 131072)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    repeats: int = 9
    most_bytes: int = 8 << 30
    llama: dict[str, Any] = field(default_factory=dict)
    forward_tokens: tuple[int, int] = (8, 2048)

    @staticmethod
    def quick(device: str) -> Settings:
        """A few seconds, on any machine."""
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
        return Settings(device, (64,), (1, 33), ("float32", "bfloat16"), 2, 1 << 20, small, (2, 16))


def gpu_backends(device: str) -> list[str]:
    """Those of ours that can run on tensors of the device, the fastest first."""
    names = ("cuda", "triton") if device == "cuda" else ("cpu",)
    available = {status.name for status in backend_status() if status.available}
    return [name for name in names if name in available]


def measure_case(
    settings: Settings, num_tokens: int, hidden_size: int, name: str
) -> dict[str, Any]:
    """All subjects on one shape and dtype."""
    dtype, device = DTYPES[name], settings.device
    pair_bytes = 2 * num_tokens * hidden_size * dtype.itemsize
    pairs = timing.cold_pairs(
        lambda seed: subjects.states(num_tokens, hidden_size, dtype, device, seed),
        pair_bytes,
        device,
    )
    case: dict[str, Any] = {
        "tokens": num_tokens,
        "hidden_size": hidden_size,
        "dtype": name,
        "bytes": pair_bytes,
        "copy_gb_per_second": pair_bytes / timing.copy_seconds(pairs, device) / 1e9,
        "seconds": {},
        "wrong": [],
    }
    torch._dynamo.reset()
    everyone = [subjects.ours(backend) for backend in gpu_backends(device)]
    for subject in everyone + subjects.in_pytorch(device):
        wrong = subjects.check(subject, *pairs[0])
        if wrong is not None:
            case["wrong"].append(wrong)
            continue
        times = timing.seconds_per_call(subject.run, pairs, device, repeats=settings.repeats)
        case["seconds"][subject.name] = {
            "median": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
        }
    return case


def forward_shares(settings: Settings) -> list[dict[str, Any]]:
    """What hooks add to a forward of a LLaMA-shaped model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings.llama or llama_that_fits()
    config = LlamaConfig(**shape)
    with torch.device(settings.device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    size = settings.forward_tokens
    on_host = torch.randint(config.vocab_size, size)
    mask, ids = torch.ones_like(on_host), on_host.to(settings.device)
    found = []
    for backend in gpu_backends(settings.device):
        scores = RunningScores(config.num_hidden_layers, backend=backend)

        def hooked(scores: RunningScores = scores) -> None:
            batch = {"input_ids": ids, "attention_mask": mask}
            feed_forward(model, model.model.layers, scores, [batch])

        @torch.no_grad()
        def bare() -> None:
            model.base_model(input_ids=ids, use_cache=False)

        pairs = []
        for _ in range(settings.repeats + 1):  # interleaved; the first pair warms up
            pairs.append([wall_seconds(run, settings.device) for run in (bare, hooked)])
        plain, with_hooks = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
        share = with_hooks / plain - 1
        found.append({"backend": backend, "shape": shape, "tokens": size, "bare_seconds": plain,
                      "hooked_seconds": with_hooks, "share": share})  # fmt: skip
    return found


def llama_that_fits() -> dict[str, Any]:
    """LLaMA2-7B's shape with as many of its 32 layers as half of the free memory holds."""
    free = torch.cuda.mem_get_info()[0]
    layer_bytes = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    layers = max(1, min(32, int(free / 2 / layer_bytes)))
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    return shape | heads | {"num_hidden_layers": layers}


def wall_seconds(run: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gb_per_second(case: dict[str, Any], subject: str) -> float:
    return case["bytes"] / case["seconds"][subject]["median"] / 1e9


def judge(
    cases: list[dict[str, Any]], forwards: list[dict[str, Any]], blocks: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each goal, what was reached at worst, and whether that is enough."""
    backend = gpu_backends_of(cases)[0]
    complete = [
        case for case in cases if {backend, "eager", "torch.compile"} <= set(case["seconds"])
    ]
    large = [case for case in complete if case["tokens"] >= 8192]

    def ratio(case: dict[str, Any], other: str) -> float:
        return case["seconds"][other]["median"] / case["seconds"][backend]["median"]

    reached = {
        "of copy from 8192 tokens up": [
            gb_per_second(case, backend) / case["copy_gb_per_second"] for case in large
        ],
        "x torch.compile": [ratio(case, "torch.compile") for case in large],
        "x eager": [ratio(case, "eager") for case in large],
        "share of a LLaMA forward": [f["share"] for f in forwards if f["backend"] == backend],
        "share of a LLaMA forward, all blocks": [
            row.get("share", math.inf) for row in blocks if row["backend"] == backend
        ],
    }
    verdicts = []
    for name, goal in GOALS.items():
        is_limit = name.startswith("share")
        values = reached[name]
        worst = (max(values) if is_limit else min(values)) if values else math.nan
        met = worst <= goal if is_limit else worst >= goal
        verdicts.append({"goal": name, "wanted": goal, "worst": worst, "met": bool(values) and met})
    return verdicts


def gpu_backends_of(cases: list[dict[str, Any]]) -> list[str]:
    found = [name for name in ("cuda", "triton", "cpu") if any(name in c["seconds"] for c in cases)]
    if not found:
        wrong = "; ".join(text for case in cases for text in case["wrong"])
        raise SystemExit(f"no backend of ours could be timed: {wrong}")
    return found


def markdown(results: dict[str, Any]) -> str:
    """The table that people read."""
    tests = results["tests"]
    told = "not run" if tests is None else "; ".join([tests["summary"], *tests["failed"]])
    lines = [
        f"# Scoring on {results['machine']}",
        "",
        f"torch {results['torch']}; medians of {results['repeats']} runs, cold buffers. "
        f"GPU tests: {told}.",
        "",
        "| goal | wanted | worst | met |",
        "|---|---|---|---|",
    ]
    for verdict in results["goals"]:
        lines.append(
            f"| {verdict['goal']} | {verdict['wanted']} | {verdict['worst']:.3g} "
            f"| {'yes' if verdict['met'] else 'NO'} |"
        )
    cases = results["cases"]
    backends = gpu_backends_of(cases)
    others = ["eager", "torch.compile", "float32 cosine", "block influence"]
    header = ["hidden size", "tokens", "dtype", "copy GB/s"]
    header += [f"{name} GB/s" for name in backends] + [f"{name} of copy" for name in backends]
    header += [f"× {name}" for name in others]
    lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for case in cases:
        row = [str(case["hidden_size"]), str(case["tokens"]), case["dtype"]]
        row.append(f"{case['copy_gb_per_second']:.0f}")
        known = [name if name in case["seconds"] else None for name in backends]
        row += ["wrong" if n is None else f"{gb_per_second(case, n):.0f}" for n in known]
        row += [
            "" if n is None else f"{gb_per_second(case, n) / case['copy_gb_per_second']:.2f}"
            for n in known
        ]
        first = known[0]
        for name in others:
            if first is None or name not in case["seconds"]:
                row.append("")
            else:
                ours, theirs = case["seconds"][first]["median"], case["seconds"][name]["median"]
                row.append(f"{theirs / ours:.2f}")
        lines.append(f"| {' | '.join(row)} |")
    wrong = [text for case in cases for text in case["wrong"]]
    lines += ["", *(f"- WRONG, not timed: {text}" for text in wrong)]
    lines += [
        "",
        "| forward | backend | bare s | hooked s | scoring's share |",
        "|---|---|---|---|---|",
    ]
    for row in results["forwards"]:
        shape = row["shape"]
        what = (
            f"{shape['num_hidden_layers']} layers of {shape['hidden_size']}, {row['tokens']} tokens"
        )
        lines.append(f"| {what} | {row['backend']} | {row['bare_seconds']:.4f} "
                     f"| {row['hooked_seconds']:.4f} | {row['share']:.2%} |")  # fmt: skip
    lines += ["", *gpu_blocks.block_lines(results["blocks"])]
    return "\n".join(lines) + "\n"


def run_tests() -> dict[str, Any]:
    """All tests that use a GPU, in a process of their own."""
    files = ["gpu", "token_metrics", "running", "operators", "blocks"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda or triton or gpu"]
    command += [str(ROOT / "tests" / f"test_{name}.py") for name in files]
    print("running the GPU tests", file=sys.stderr)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines() or [result.stderr]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": result.returncode, "summary": lines[-1], "failed": failed}


def run(settings: Settings) -> dict[str, Any]:
    combinations = list(itertools.product(settings.dtypes, settings.hidden_sizes, settings.tokens))
    fitting = [
        (dtype, hidden, tokens)
        for dtype, hidden, tokens in combinations
        if 2 * tokens * hidden * DTYPES[dtype].itemsize <= settings.most_bytes
    ]
    cases = [
        measure_case(settings, tokens, hidden, dtype)
        for dtype, hidden, tokens in track(fitting, "timing", total=len(fitting))
    ]
    forwards = forward_shares(settings)
    measured = [
        gpu_blocks.measure_blocks(row, settings.repeats, settings.device, wall_seconds)
        for row in forwards
    ]
    blocks = [row for row in measured if row is not None]
    return {
        "machine": describe_machine(),
        "torch": torch.__version__,
        "repeats": settings.repeats,
        "goals": judge(cases, forwards, blocks),
        "forwards": forwards,
        "blocks": blocks,
        "cases": cases,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few tiny cases, on any machine")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"),
                        help="without suffix: .json and .md are written")  # fmt: skip
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        print("gpu-check needs a CUDA GPU, and none is visible: nothing was run", file=sys.stderr)
        return 2
    tests = None if arguments.quick else run_tests()
    results = run(Settings.quick(device) if arguments.quick else Settings(device))
    results["tests"] = tests
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)
    return 1 if tests and tests["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
