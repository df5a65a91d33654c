"""docs/figures.md and the figures of README.md, written from the committed results.

    python benchmarks/figures.py            # writes both
    python benchmarks/figures.py --check    # says what differs from the files; exit code 1

Sections of the page are in figure_sections.py. Blocks of README.md, which stand there between
`<!-- figures NAME -->` and `<!-- end -->`, are below, a function each. Tables of GPUs are on
docs/gpu.md (gpu_page.py, predict.py).
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figure_sections as sections
import quality_figures
from committed_results import ROOT, Results, extent, joined, lines, paragraph

README, PAGE = ROOT / "README.md", ROOT / "docs" / "figures.md"
HEAD = """# What was measured

<!-- Written by `python benchmarks/figures.py` from benchmarks/results; a test compares them. -->"""
MINUTES = ("five", "six", "seven", "eight", "nine", "ten")
_BLOCK = re.compile(r"(<!-- figures ([\w-]+) -->\n)(.*?)(<!-- end -->\n)", flags=re.DOTALL)


def page(found: Results) -> str:
    """docs/figures.md."""
    return joined(HEAD, *(section(found) for section in sections.SECTIONS)) + "\n"


def in_short(found: Results) -> str:
    demo = found.json(f"demo-{sections.MACHINE}")
    of, content = sections.repair_numbers(found)
    times = [demo["pruned"]["speed"][phase] / demo["dense"]["speed"][phase]
             for phase in ("decode", "prefill")]  # fmt: skip
    minutes = MINUTES[round(content["seconds"] / 60) - 5]
    return paragraph(
        f"SmolLM2-135M without 7 of its 30 layers is {extent(times, 1)} times faster; its held-out "
        f"perplexity goes from {of['dense']:.1f} to {of['pruned']:.1f}, and back to "
        f"{of['recovered']:.1f} by {minutes} minutes of repair on two CPU cores "
        "([figures](docs/figures.md))."
    )


def demo(found: Results) -> str:
    return lines(sections.demo_table(found))


def quality(found: Results) -> str:
    return quality_figures.summary(found)


def scoring(found: Results) -> str:
    def wanted(case: dict[str, Any]) -> bool:
        return case["hidden_size"] in (576, 4096) and case["dtype"] in ("float32", "bfloat16")

    return joined(
        paragraph("One update of running scores on the CPU",
                  f"{found.origin(f'suite-{sections.MACHINE}.json')}:"),
        lines(sections.scoring_table(found, wanted)),
    )  # fmt: skip


def accuracy(found: Results) -> str:
    return joined(paragraph(sections.accuracy_words(found)), lines(sections.accuracy_table(found)))


def surgery(found: Results) -> str:
    return paragraph(sections.surgery_words(found))


def limits(found: Results) -> str:
    demo = found.json(f"demo-{sections.MACHINE}")
    ratio = demo["pruned"]["perplexity"] / demo["dense"]["perplexity"]
    parts = [
        f"To remove 7 of the 30 layers ({7 / 30:.0%}) of a 135M model without recovery costs "
        f"quality: {ratio:.1f} times the perplexity."
    ]
    parts += quality_figures.limits(found)
    return "\n".join("- " + paragraph(part).replace("\n", "\n  ") for part in parts)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "in-short": in_short, "demo": demo, "quality": quality, "scoring": scoring,
    "accuracy": accuracy, "surgery": surgery, "limits": limits,
}  # fmt: skip


def with_blocks(text: str, found: Results) -> str:
    """README.md with every block written anew.

    Raises:
        SystemExit: the blocks in it are not those of BLOCKS, each once.
    """
    names = [name for _, name, _, _ in _BLOCK.findall(text)]
    if sorted(names) != sorted(BLOCKS):
        raise SystemExit(f"figures: README.md must have the blocks {sorted(BLOCKS)}, got {names}")

    def written(match: re.Match[str]) -> str:
        content = BLOCKS[match[2]](found).replace("](../", "](")
        return match[1] + ("\n" + content + "\n\n" if content else "") + match[4]

    return _BLOCK.sub(written, text)


def without_blocks(text: str) -> str:
    """What of README.md is typed."""
    return _BLOCK.sub("", text)


def written(found: Results) -> dict[Path, str]:
    """Both pages, as they must be."""
    return {README: with_blocks(README.read_text(), found), PAGE: page(found)}


def differences(found: Results) -> list[str]:
    """Lines of a diff between the pages and what they must be."""
    return [
        line
        for path, text in written(found).items()
        for line in difflib.unified_diff(
            (path.read_text() if path.exists() else "").splitlines(), text.splitlines(),
            f"{path.name}, committed", f"{path.name}, from the results", lineterm="",
        )
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    found = Results()
    if parser.parse_args().check:
        differing = differences(found)
        print("\n".join(differing) or "nothing differs")
        return 1 if differing else 0
    for path, text in written(found).items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
