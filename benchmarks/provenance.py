"""Where a committed result comes from, and whether the code that it measured is still the same.

    python benchmarks/provenance.py record benchmarks/results/demo.json --sources planning speed \
        --command "make demo"
    python benchmarks/provenance.py adopt benchmarks/results/old.json --commit 408196c \
        --sources planning --command "make demo" --machine "AMD EPYC, 2 cores"
    python benchmarks/provenance.py statement planning --because "renames an argument"

Scripts of this folder do the first themselves, with `keep`. `results/manifest.json` holds for every
result file its SHA-256, the command, commit and machine that made it, and for every group of
sources that it measured a digest of them. The digest leaves out comments, docstrings, imports,
white space, last commas and the names of files: what moves or is formatted anew is measured still.
Where the code has changed since in a way that cannot change the figure, a statement says so, from
digest to digest; where the figure is of older code and is shown as such, its entry has the words
(`shown_as`) with which figures.py says so on docs/figures.md.
`tests/benchmarks/test_provenance.py` holds all of it.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MANIFEST = RESULTS / "manifest.json"

SOURCES: dict[str, tuple[str, ...]] = {
    "cpu scorers": ("csrc/common/*.h", "csrc/cpu/*", "csrc/torch/*", "simdiff_kernels/*.py"),
    "gpu scorers": ("csrc/common/*.h", "csrc/cuda/*", "simdiff_kernels/triton/*.py"),
    **{
        name: tuple(f"python/simdiff/{path}.py" for path in paths.split())
        for name, paths in {
            "calibration pass": "scoring/hooks scoring/running_block_groups scoring/running_groups "
            "scoring/scores scoring/calibration_pass models/layer_calls data/batches",
            "planning": "planning/alpha_sweep planning/block_costs planning/blocks planning/bypass "
            "planning/criteria planning/exchange planning/make_plan planning/perplexity_search "
            "planning/plan planning/selection planning/shortlist data/documents data/halves "
            "data/related data/text "
            "evaluation/losses models/partial_forward surgery/layers",
            "effort": "evaluation/divergence planning/batches planning/cost planning/effort "
            "planning/effort_search planning/kept_runs planning/names planning/readings",
            "speed": "speed/bench speed/decoding speed/machine_rates speed/protocol "
            "speed/run_speed surgery/copies",
            "recovery": "data/batches models/partial_forward recovery/* recovery/closed_form/* "
            "recovery/training/* surgery/copies",
            "tasks": "evaluation/answers evaluation/demo_tasks evaluation/lm_eval_harness "
            "evaluation/task_files evaluation/task_scores evaluation/tasks",
            "sub-layers": "sublayers/*",
            "checkpoint surgery": "checkpoints/cut checkpoints/layer_numbering "
            "io/safetensors_header",
        }.items()
    },
}
"""What is measured, by the names that entries of the manifest use."""


def digest(name: str) -> str:
    """Of a group of sources as they are now, 16 hexadecimal digits.

    Raises:
        FileNotFoundError: a pattern of the group matches no file.
    """
    found: dict[str, str] = {}
    for pattern in SOURCES[name]:
        files = [path for path in sorted(ROOT.glob(pattern)) if path.is_file()]
        if not files:
            raise FileNotFoundError(f"sources of {name!r}: no file is {pattern}")
        found |= {str(path.relative_to(ROOT)): path.read_text() for path in files}
    return digest_of(found)


def digest_at(name: str, revision: str) -> str:
    """Of a group of sources at a commit, which may not have had all of its files yet."""
    patterns = [PurePosixPath(pattern) for pattern in SOURCES[name]]
    found = {}
    for file in git("ls-tree", "-r", "--name-only", revision).splitlines():
        path = PurePosixPath(file)
        if any(path.parent == pattern.parent and path.match(pattern.name) for pattern in patterns):
            found[file] = git("show", f"{revision}:{file}")
    return digest_of(found)


def digest_of(files: dict[str, str]) -> str:
    """Of sources by name, whose suffix tells the language; the names do not count."""
    plain = (_plain(source, PurePosixPath(name).suffix) for name, source in files.items())
    parts = sorted(hashlib.sha256(text.encode()).hexdigest() for text in plain)
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def git(*words: str) -> str:
    """What git prints about this tree."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def _plain(source: str, suffix: str) -> str:
    """What a computer does with it: no comments, docstrings, imports, white space, last commas."""
    if suffix != ".py":
        kept = [
            ln for ln in source.splitlines() if not re.match(r"\s*(//|#include|#pragma once)", ln)
        ]
        return re.sub(r"\s", "", "".join(kept))
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_docstring(node):
            for number in range(node.lineno - 1, (node.end_lineno or node.lineno)):
                lines[number] = ""
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s", "", "".join(lines)))


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


def is_current(
    name: str,
    measured: str,
    statements: Iterable[dict[str, str]],
    today: Callable[[str], str] = digest,
) -> bool:
    """Whether sources of this digest are today's, or statements lead from it to them."""
    known, before = {measured}, set[str]()
    statements = [statement for statement in statements if statement["sources"] == name]
    while known != before:
        before = set(known)
        known |= {statement["to"] for statement in statements if statement["from"] in known}
    return today(name) in known


def origin(sources: Iterable[str]) -> dict[str, Any]:
    """Commit, whether the tree was clean, results apart, and digests of the sources, now.

    Where there is no git or no repository, the commit is None and the tree is not clean.
    """
    found = {"sources": {name: digest(name) for name in sources}}
    try:
        changed = git("status", "--porcelain", "--no-renames", "--untracked-files=all").splitlines()
        revision = git("rev-parse", "HEAD").strip()[:12]
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": False} | found
    clean = all(line[3:].startswith("benchmarks/results/") for line in changed)
    return {"commit": revision, "clean": clean} | found


def is_result(path: Path) -> bool:
    """Whether a file lies among the committed results."""
    return path.resolve().parent == RESULTS.resolve()


def command_line(program: str, words: Iterable[str]) -> str:
    """For people to repeat it: of paths outside of this tree only the name is kept."""

    def told(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        path = Path(value)
        if path.is_absolute():
            inside = path.is_relative_to(ROOT)
            value = str(path.relative_to(ROOT)) if inside else path.name
        return f"{option}{equals}{value}"

    return shlex.join([program, *map(told, words)])


def keep(
    paths: Iterable[Path],
    sources: Sequence[str],
    command: str | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Record those of the files that a script has written which are committed results.

    The command is the one that runs now, and the tree as it is, where they are left out.
    """
    results = [path for path in paths if is_result(path)]
    if command is None:
        script = Path(sys.argv[0]).resolve()
        command = "python " + command_line(str(script.relative_to(ROOT)), sys.argv[1:])
    if results:
        record(results, sources, command, origin)


def record(
    paths: Sequence[Path], sources: Sequence[str], command: str, made: dict[str, Any] | None = None
) -> None:
    """Enter results that have just been made by the code of this tree, or by that of `made`."""
    from simdiff.io.machine import describe_machine

    made = origin(sources) if made is None else made
    for path in paths:
        enter(
            path,
            {
                "command": command,
                "date": datetime.date.today().isoformat(),
                "machine": describe_machine(),
                **made,
            },
        )


def adopt(
    path: Path,
    revision: str,
    sources: Sequence[str],
    command: str,
    machine: str,
    clean: bool | None,
    shown_as: str | None,
) -> None:
    """Enter an older result, made by the code of a commit, with what is known of it."""
    revision = git("rev-parse", revision).strip()
    enter(
        path,
        {
            "command": command,
            "date": git("show", "-s", "--format=%as", revision).strip(),
            "machine": machine,
            "commit": revision[:12],
            "clean": clean,
            "sources": {name: digest_at(name, revision) for name in sources},
            **({} if shown_as is None else {"shown_as": shown_as}),
        },
    )


def enter(path: Path, entry: dict[str, Any]) -> None:
    """Put an entry, with the file's digest, in the place of what the manifest says of it."""
    manifest = read_manifest()
    manifest["results"][path.name] = {"sha256": file_digest(path), **entry}
    write_manifest(manifest)


def file_digest(path: Path) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


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
    adopting = commands.add_parser("adopt", help="older results")
    for job in (recording, adopting):
        job.add_argument("results", type=Path, nargs="+")
        job.add_argument("--sources", nargs="+", choices=SOURCES, required=True)
        job.add_argument("--command", required=True, help="that made them")
    adopting.add_argument("--commit", required=True, help="whose code made them")
    adopting.add_argument("--machine", required=True)
    adopting.add_argument("--clean", choices=("yes", "no"), help="the tree; if it is known")
    adopting.add_argument("--shown-as", help="words of a page that say they are of older code")
    stating = commands.add_parser("statement", help="what changed does not touch the results")
    stating.add_argument("sources", choices=SOURCES)
    stating.add_argument("--because", required=True)
    options = parser.parse_args()
    if options.job == "record":
        record(options.results, options.sources, options.command)
    elif options.job == "adopt":
        clean = None if options.clean is None else options.clean == "yes"
        for path in options.results:
            adopt(
                path,
                options.commit,
                options.sources,
                options.command,
                options.machine,
                clean,
                options.shown_as,
            )
    else:
        state(options.sources, options.because)


if __name__ == "__main__":
    main()
