"""Where a committed result comes from, and whether the code that it measured is still the same.

    python benchmarks/provenance.py record benchmarks/results/demo.json --sources planning speed \
        --command "make demo"
    python benchmarks/provenance.py statement planning --because "renames an argument"

`results/manifest.json` holds for every result file its SHA-256, the command, commit and machine
that made it, and for every group of sources that it measured a digest of them. The digest leaves
out comments, docstrings, imports, white space and the names of files: what moves is measured still.
Where the code has changed since in a way that cannot change the figure, a statement says so, from
digest to digest; where the figure is of older code and is shown as such, the words that say so on
the page are in its entry. `tests/test_provenance.py` holds all of it.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MANIFEST = RESULTS / "manifest.json"

_TOOLKIT = "python/simdiff/"
SOURCES: dict[str, tuple[str, ...]] = {
    "cpu scorers": ("csrc/common/*.h", "csrc/cpu/*", "csrc/torch/*", "simdiff_kernels/*.py"),
    "gpu scorers": ("csrc/common/*.h", "csrc/cuda/*", "simdiff_kernels/triton/*.py"),
    "calibration pass": tuple(
        f"{_TOOLKIT}{name}.py"
        for name in ("hooks", "running_block_groups", "running_groups", "scores")
    ),
    "planning": tuple(
        f"{_TOOLKIT}{name}.py"
        for name in (
            "alpha_sweep", "block_costs", "block_selection", "bypass", "calibration", "criteria",
            "evaluation", "exchange", "planning", "searches", "selection", "shortlist", "surgery",
        )
    ),
    "speed": tuple(
        f"{_TOOLKIT}{name}.py"
        for name in ("decoding", "speed", "speed_bench", "speed_protocol", "speed_rates")
    ),
    "recovery": (f"{_TOOLKIT}recovery/*.py",),
    "tasks": tuple(f"{_TOOLKIT}{name}.py" for name in ("task_files", "task_scores", "tasks")),
    "sub-layers": (f"{_TOOLKIT}sublayer*.py",),
    "checkpoint surgery": tuple(
        f"{_TOOLKIT}{name}.py" for name in ("checkpoint", "safetensors_files", "stored_layers")
    ),
}  # fmt: skip
"""What is measured, by the names that entries of the manifest use."""


def digest(name: str) -> str:
    """Of a group of sources, 16 hexadecimal digits.

    Raises:
        FileNotFoundError: a pattern of the group matches no file.
    """
    found = []
    for pattern in SOURCES[name]:
        files = sorted(ROOT.glob(pattern))
        if not files:
            raise FileNotFoundError(f"sources of {name!r}: no file is {pattern}")
        found += [_plain(path.read_text(), path.suffix) for path in files if path.is_file()]
    parts = sorted(hashlib.sha256(text.encode()).hexdigest() for text in found)
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _plain(source: str, suffix: str) -> str:
    """What a computer does with it: no comments, docstrings, imports, white space."""
    lines = source.splitlines()
    if suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_docstring(node):
                for number in range(node.lineno - 1, (node.end_lineno or node.lineno)):
                    lines[number] = ""
        comment = r"\s*#"
    else:
        comment = r"\s*(//|#include|#pragma once)"
    return re.sub(r"\s", "", "".join(line for line in lines if not re.match(comment, line)))


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def read_manifest() -> dict[str, Any]:
    """Entries of results by file name, and statements."""
    if not MANIFEST.exists():
        return {"results": {}, "statements": []}
    content: dict[str, Any] = json.loads(MANIFEST.read_text())
    return content


def is_current(name: str, measured: str, statements: Iterable[dict[str, str]]) -> bool:
    """Whether sources of this digest are today's, or statements lead from it to them."""
    known, before = {measured}, set[str]()
    statements = list(statements)
    while known != before:
        before = set(known)
        known |= {s["to"] for s in statements if s["sources"] == name and s["from"] in known}
    return digest(name) in known


def commit() -> dict[str, Any]:
    """The commit of the tree and whether it was clean, results apart."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = [line[3:] for line in git("status", "--porcelain").splitlines()]
    return {
        "commit": git("rev-parse", "HEAD")[:12],
        "clean": all(name.startswith("benchmarks/results/") for name in changed),
    }


def record(paths: Sequence[Path], sources: Sequence[str], command: str) -> None:
    """Enter results that have just been made by the code of this tree."""
    from simdiff.machine import describe_machine

    manifest = read_manifest()
    for path in paths:
        manifest["results"][path.name] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
            "command": command,
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            **commit(),
            "sources": {name: digest(name) for name in sources},
        }
    write_manifest(manifest)


def write_manifest(manifest: dict[str, Any]) -> None:
    """In the order of file names."""
    manifest["results"] = dict(sorted(manifest["results"].items()))
    MANIFEST.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def state(name: str, because: str) -> None:
    """Say that sources changed since every result of older digests in no way that they show."""
    manifest = read_manifest()
    today = digest(name)
    older = {
        entry["sources"][name]
        for entry in manifest["results"].values()
        if name in entry["sources"] and "shown_as" not in entry
    }
    for known in sorted(older):
        if not is_current(name, known, manifest["statements"]):
            manifest["statements"].append(
                {"sources": name, "from": known, "to": today, "because": because}
            )
    write_manifest(manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="job", required=True)
    recording = commands.add_parser("record", help="results that were just made")
    recording.add_argument("results", type=Path, nargs="+")
    recording.add_argument("--sources", nargs="+", choices=SOURCES, required=True)
    recording.add_argument("--command", required=True, help="that made them")
    stating = commands.add_parser("statement", help="what changed does not touch the results")
    stating.add_argument("sources", choices=SOURCES)
    stating.add_argument("--because", required=True)
    options = parser.parse_args()
    if options.job == "record":
        record(options.results, options.sources, options.command)
    else:
        state(options.sources, options.because)


if __name__ == "__main__":
    main()
