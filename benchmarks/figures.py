"""docs/figures.md and the figures of other pages, written from the committed results.

    python benchmarks/figures.py            # writes all pages
    python benchmarks/figures.py --check    # says what differs from the files; exit code 1

Sections of docs/figures.md are in figure_sections.py, quality_figures.py, task_figures.py and
scorer_sections.py.
Blocks of README.md, docs/limits.md and docs/guide.md, which stand there between
`<!-- figures NAME -->` and `<!-- end -->`, are below, a function each. Tables of GPUs are on
docs/gpu.md (gpu_page.py, predict.py).
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import figure_sections as sections
import gpu_page
import quality_figures
import scorer_sections
import task_figures
from committed_results import MACHINE, ROOT, Results, extent, joined, lines, paragraph
from gpu_page import table

README, PAGE = ROOT / "README.md", ROOT / "docs" / "figures.md"
LIMITS = ROOT / "docs" / "limits.md"
GUIDE = ROOT / "docs" / "guide.md"
HEAD = """# What was measured

<!-- Written by `python benchmarks/figures.py` from benchmarks/results; a test compares them. -->"""
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BLOCK = re.compile(r"(<!-- figures ([\w-]+) -->\n)(.*?)(<!-- end -->\n)", flags=re.DOTALL)


def page(found: Results) -> str:
    """docs/figures.md."""
    return joined(HEAD, *(section(found) for section in sections.SECTIONS)) + "\n"


def in_short(found: Results) -> str:
    demo = found.json(f"demo-{MACHINE}")
    times = [
        demo["pruned"]["speed"][phase] / demo["dense"]["speed"][phase]
        for phase in ("decode", "prefill")
    ]
    words = (
        f"SmolLM2-135M without {len(demo['removed'])} of its {demo['num_layers']} layers is "
        f"{extent(times, 2)} times faster; its held-out perplexity goes from "
        f"{demo['dense']['perplexity']:.1f} to {demo['pruned']['perplexity']:.1f}"
    )
    repair = sections.repair_of_the_demo(found)
    if repair is not None:
        minutes = max(1, round(repair.seconds / 60))
        amount = NUMBERS[minutes - 1] if minutes <= len(NUMBERS) else str(minutes)
        words += (
            f", and back to {repair.perplexity:.1f} by {amount} minute{'s'[: minutes > 1]} of "
            f"repair ({repair.name}) on two CPU cores"
        )
    return paragraph(f"{words} ([figures](docs/figures.md)).")


def results(found: Results) -> str:
    """All perplexities on the same held-out windows, those of the demo."""
    demo = found.json(f"demo-{MACHINE}")
    text = demo["evaluation"]
    repair, asked = sections.repair_of_the_demo(found), task_figures.averages(found)
    heads, *rows = (
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in sections.demo_table(found)
        if not row.startswith("|---")
    )
    if repair is not None:
        heads.append(f"repaired, {repair.name}")
        for row in rows:
            row.append(f"{repair.perplexity:.2f}" if row[0] == "held-out perplexity" else "")
    rows += [[*row[: len(heads)]] for row in asked]
    names = [f"demo-{MACHINE}.json"] + ([repair.file] if repair else [])
    names += [f"tasks-{MACHINE}.json"] * bool(asked)
    return joined(
        paragraph(
            f"SmolLM2-135M-Instruct without {len(demo['removed'])} of its {demo['num_layers']} "
            f"layers, perplexity on the same {text['num_windows']} held-out windows of "
            f"{text['window_length']} tokens throughout "
            f"{found.origin(*names)}.",
            "The repaired model is as fast and as large as the pruned one." if repair else "",
            "Tasks: right answers chosen among given ones (classification) and written "
            "(generation), where the dense model is above chance."
            if asked
            else "",
        ),
        lines(table(heads, rows)),
    )


def accuracy(found: Results) -> str:
    errors = scorer_sections.accuracy_errors(found)
    peers, ours = "1 - cosine_similarity", "ours, avx512"
    columns = {
        "float32, 1 − cosine_similarity": ("float32", peers),
        "bfloat16, to float32 first": ("bfloat16", f"{peers}, float32"),
        "float32, ours": ("float32", ours),
        "bfloat16, ours": ("bfloat16", ours),
    }
    return joined(
        paragraph(
            "Worst relative error of the distance over 256 tokens of hidden size 4096 with one "
            f"massive channel, 300 times the rest {found.origin('accuracy.csv')}:"
        ),
        lines(
            table(
                ("distance", *columns),
                (
                    (
                        distance,
                        *(f"{errors[dtype, distance, way]:.0e}" for dtype, way in columns.values()),
                    )
                    for distance in ("1e-3", "1e-5", "1e-7")
                ),
            )
        ),
    )


def limits(found: Results) -> str:
    demo = found.json(f"demo-{MACHINE}")
    ratio = demo["pruned"]["perplexity"] / demo["dense"]["perplexity"]
    gone, of = len(demo["removed"]), demo["num_layers"]
    parts = [
        f"To remove {gone} of the {of} layers ({gone / of:.0%}) of a 135M model without recovery "
        f"costs quality: {ratio:.1f} times the perplexity."
    ]
    parts += quality_figures.limits(found)
    return "\n".join("- " + paragraph(part).replace("\n", "\n  ") for part in parts)


def costs(found: Results) -> str:
    """Minutes of commands for large models, computed from the rates of measured passes."""
    demo, name = found.json(f"demo-{MACHINE}"), f"pass-{MACHINE}"
    layer = (demo["dense"]["num_parameters"] - demo["pruned"]["num_parameters"]) / len(
        demo["removed"]
    )
    ours = next(one for one in found.json(name) if one["dtype"] == "bfloat16")
    gpu = found.json(gpu_page.MEASURED.stem)
    (theirs,) = gpu_page.of_part(gpu, "pass")
    shape = theirs["shape"]
    wide, heads = shape["hidden_size"], shape["num_attention_heads"]
    entries = 2 * wide * wide * (1 + shape["num_key_value_heads"] / heads)
    entries += 3 * wide * shape["intermediate_size"]
    # Two operations for each entry of a matrix of the layers and token.
    passes = {
        "two CPU cores": (
            demo["num_layers"] * layer,
            math.prod(map(int, ours["tokens"].split(" x "))),
            ours["bare_seconds"],
        ),
        f"one {gpu['name']}": (
            shape["num_hidden_layers"] * entries,
            math.prod(theirs["tokens"]),
            theirs["seconds"]["bare"],
        ),
    }
    rates = {on: 2 * size * tokens / seconds for on, (size, tokens, seconds) in passes.items()}
    rows = [
        (
            f"{size} billion parameters",
            *(
                minutes(2e9 * size * 32 * 512 * count / r)
                for r in rates.values()
                for count in (1, 2)
            ),
        )
        for size in (1, 8, 70)
    ]
    heads_of = [f"{step}, {on}" for on in rates for step in ("`score`", "`eval` of two models")]
    told = " and ".join(f"{rate / 1e9:,.0f} · 10⁹ a second ({on})" for on, rate in rates.items())
    return joined(
        paragraph(
            "Computed, not measured, for 32 windows of 512 tokens in bfloat16, where the weights "
            "fit: two operations for each parameter and token, at the rate that a forward pass "
            f"reached, {told}, without the loading "
            f"{found.origin(f'{name}.json', gpu_page.MEASURED.name)}:"
        ),
        lines(table(("model", *heads_of), rows)),
    )


def minutes(seconds: float) -> str:
    """A time in the unit that people use for it."""
    for most, unit, size in ((100, "s", 1), (6000, "min", 60)):
        if seconds < most:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:.2g} h"


BLOCKS: dict[Path, dict[str, Callable[[Results], str]]] = {
    README: {"in-short": in_short, "results": results, "accuracy": accuracy},
    LIMITS: {"limits": limits},
    GUIDE: {"costs": costs},
}


def with_blocks(text: str, found: Results, page: Path = README) -> str:
    """A page with every block written anew.

    Raises:
        SystemExit: the blocks in it are not those of BLOCKS, each once.
    """
    wanted = BLOCKS[page]
    names = [name for _, name, _, _ in _BLOCK.findall(text)]
    if sorted(names) != sorted(wanted):
        raise SystemExit(f"figures: {page.name} must have the blocks {sorted(wanted)}, got {names}")

    def written(match: re.Match[str]) -> str:
        content = wanted[match[2]](found)
        if page.parent == ROOT:
            content = content.replace("](../", "](")
        return match[1] + ("\n" + content + "\n\n" if content else "") + match[4]

    return _BLOCK.sub(written, text)


def without_blocks(text: str) -> str:
    """What of a page is typed."""
    return _BLOCK.sub("", text)


def written(found: Results) -> dict[Path, str]:
    """All pages, as they must be."""
    with_figures = {path: with_blocks(path.read_text(), found, path) for path in BLOCKS}
    return {**with_figures, PAGE: page(found)}


def differences(found: Results) -> list[str]:
    """Lines of a diff between the pages and what they must be."""
    return [
        line
        for path, text in written(found).items()
        for line in difflib.unified_diff(
            (path.read_text() if path.exists() else "").splitlines(),
            text.splitlines(),
            f"{path.name}, committed",
            f"{path.name}, from the results",
            lineterm="",
        )
    ]


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
