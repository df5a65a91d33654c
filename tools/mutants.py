"""Which changes of the code no test notices: a seeded sample of mutants, run by mutmut.

    python tools/mutants.py /tmp/mutants                    # 14 of each module named in pyproject
    python tools/mutants.py /tmp/mutants 50 'simdiff.planning.budget.*' --seed 1

Mutants of words alone (messages, labels, options of a command line) are left out. Each is judged
by the tests that call its function, the quickest first, until they have taken 15 seconds; what runs
at import has to be tried by hand, with MUTANT_UNDER_TEST=NAME in the environment of pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 15.0
WORDS = re.compile(
    r"raise |Error\(|warn\(|print\(|add_argument|ArgumentParser|add_parser|help=|track\(|set_x"
    r"|set_y|\.legend|title"
)


def lay_out(directory: Path) -> None:
    """A copy whose modules lie in `src`, where mutmut finds each by the name that tests import."""
    source = directory / "src"
    shutil.copytree(ROOT / "python" / "simdiff", source / "simdiff")
    for path in (ROOT / "benchmarks").iterdir():
        if path.name == "gpu":
            shutil.copytree(path, source / path.name)
        elif path.suffix == ".py" and path.name != "conftest.py" and path.stem[:5] != "test_":
            shutil.copy2(path, source)
    for name in ("tests", "benchmarks", "simdiff_kernels", "docs", "csrc", "python"):
        shutil.copytree(ROOT / name, directory / name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy2(ROOT / name, directory)


def is_of_words(diff: str) -> bool:
    """Whether a mutant changes the case of a string or its ends, or a line that tells something."""
    old, new = (
        [line[1:] for line in diff.splitlines() if line[:1] == sign and line[:3] != 3 * sign]
        for sign in "-+"
    )
    before, after = "".join(old).lower(), "".join(new).lower()
    return before in (after, after.replace("xx", "")) or any(map(WORDS.search, old))


def sample(patterns: list[str], count: int, seed: int) -> list[str]:
    """Names of mutants, so many of each module."""
    from mutmut.__main__ import collect_source_file_mutation_data
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    mutants, _ = collect_source_file_mutation_data(mutant_names=patterns)
    modules: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for data, name, _ in mutants:
        modules[name.rpartition(".")[0]].append((name, data.path))
    names, generator = [], random.Random(seed)
    for module in sorted(modules):
        pool = sorted(modules[module])
        generator.shuffle(pool)
        chosen = (n for n, path in pool if not is_of_words(get_diff_for_mutant(n, path=path)))
        names += [name for name, _ in zip(chosen, range(count), strict=False)]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="new or empty: the copy that is changed")
    parser.add_argument("count", type=int, nargs="?", default=14, help="mutants of a module")
    parser.add_argument("patterns", nargs="*", help="names of mutants to draw from")
    parser.add_argument("--seed", type=int, default=20261127)
    options = parser.parse_args()
    lay_out(options.directory)
    os.chdir(options.directory)

    import mutmut.__main__ as mutmut
    from mutmut.runners.harness import PytestRunner

    everything = PytestRunner._pytest_args_regular_run

    def quickest(runner: PytestRunner, tests: list[str]) -> list[str]:
        durations = json.loads(Path("mutmut-stats.json").read_text())["duration_by_test"]
        chosen, total = [], 0.0
        for test in sorted(tests, key=lambda test: durations.get(test, 0.0)):
            if total <= SECONDS:
                chosen.append(test)
                total += durations.get(test, 0.0)
        return everything(runner, chosen)

    PytestRunner._pytest_args_regular_run = lambda runner, tests: (
        quickest(runner, list(tests)) if tests else everything(runner, tests)
    )
    mutmut.set_mutant_under_test("mutant_generation")
    Path("mutants").mkdir()
    for prepare in (mutmut.copy_src_dir, mutmut.copy_also_copy_files, mutmut.setup_source_paths):
        prepare()
    mutmut.create_mutants(1)
    mutmut._run(sample(options.patterns, options.count, options.seed), 1)


if __name__ == "__main__":
    main()
