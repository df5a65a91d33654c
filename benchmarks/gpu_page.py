"""The tables of docs/gpu.md that hold what a GPU measured, written from a committed result.

    python benchmarks/gpu_page.py            # prints the section
    python benchmarks/gpu_page.py --write    # and puts it into docs/gpu.md

The section of what is predicted, on the same page, is written by predict.py.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu import tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
MEASURED = ROOT / "benchmarks" / "results" / "gpu-h200-2026-11-27.json"
DATE = MEASURED.stem[-10:]
PAPER_RATIO = 1.49


def measured() -> dict[str, Any]:
    """The committed result."""
    content: dict[str, Any] = json.loads(MEASURED.read_text())
    return content


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of Markdown."""
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(map(str, row))} |" for row in rows]


def section(page: str, name: str) -> str:
    """What stands between the markers of a section, its last line break included.

    Raises:
        ValueError: not both markers once.
    """
    start, end = _markers(name)
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE.name}: must hold {start.strip()} and {end.strip()} once")
    return page.partition(start)[2].partition(end)[0]


def with_section(page: str, name: str, text: str) -> str:
    """The page with another text between the markers."""
    start, end = _markers(name)
    return page.replace(start + section(page, name) + end, start + text + end)


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def command(doc: str, name: str, document: Callable[[], str]) -> None:
    """Print a section, and with --write put it into the page."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(with_section(PAGE.read_text(), name, document()))
    print(document(), end="")


def of_part(content: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The results of one part of `make gpu-check`, in the order of measuring."""
    return [result for result in content["results"] if result["part"] == part]


def document() -> str:
    """The section `measured`."""
    content = measured()
    gpu = content["gpu"]
    where = (
        f"{content['name']} ({gpu['multiprocessors']} multiprocessors, "
        f"{gpu['l2_bytes'] >> 20} MB L2), {DATE}, commit {content['commit'][:12]}, "
        + ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        + f" ([results](../benchmarks/results/{MEASURED.name}))."
    )
    (generation,) = of_part(content, "inference")
    parts = [
        *textwrap.wrap(where, 100),
        "",
        "### Row sums and updates, as a share of a pure read",
        "",
        *_updates(of_part(content, "update")),
        "",
        "### Beside PyTorch",
        "",
        *_peers(of_part(content, "peers")),
        "",
        "### All blocks of 33 states",
        "",
        *_blocks(of_part(content, "blocks")),
        "",
        "### What scoring adds to a calibration pass",
        "",
        *_calibration(of_part(content, "pass")[0]),
        "",
        "### A pruned model's speed",
        "",
        *_inference(generation),
        "",
        "### Right or wrong",
        "",
        *_checks(content),
        "",
        "### Goals",
        "",
        *_goals(content),
    ]
    return "\n".join(parts) + "\n"


def _updates(cases: Sequence[dict[str, Any]]) -> list[str]:
    columns = ("dtype", "hidden size", "tokens", "read, µs", "read, GB/s")
    subjects = [(what, by) for what in ("row_sums", "update") for by in ("cuda", "triton")]
    return table(
        (*columns, *(f"{what.replace('_', ' ')}, {by}" for what, by in subjects)),
        (
            (
                case["dtype"],
                case["hidden_size"],
                case["tokens"],
                f"{1e6 * case['read_seconds']:.1f}",
                f"{case['bytes'] / case['read_seconds'] / 1e9:.0f}",
                *(f"{case['ours'][what][by]['share']:.2f}" for what, by in subjects),
            )
            for case in cases
        ),
    )


def _peers(cases: Sequence[dict[str, Any]]) -> list[str]:
    return table(
        ("dtype", "tokens × hidden size", "who", "µs", "GB/s", "times our update"),
        (
            (
                case["dtype"],
                f"{case['tokens']} × {case['hidden_size']}",
                name,
                f"{1e6 * found['seconds']:.1f}",
                f"{case['bytes'] / found['seconds'] / 1e9:.0f}",
                f"{found['seconds'] / case['subjects']['update, cuda']['seconds']:.2f}",
            )
            for case in cases
            for name, found in case["subjects"].items()
        ),
    )


def _blocks(cases: Sequence[dict[str, Any]]) -> list[str]:
    return table(
        ("bfloat16 states", "tokens × hidden size", "ms", "of a read of them"),
        (
            (
                case["case"],
                f"{' × '.join(map(str, case['tokens']))} × {case['hidden_size']}",
                f"{1e3 * case['seconds']:.2f}",
                f"{case['share']:.2f}",
            )
            for case in cases
        ),
    )


def _calibration(content: dict[str, Any]) -> list[str]:
    sequences, length = content["tokens"]
    shape = content["shape"]
    text = (
        f"LLaMA-3.1-8B's shape ({shape['num_hidden_layers']} layers of {shape['hidden_size']}, "
        f"random weights, bfloat16), {content['batches']} batches of {sequences} × {length} "
        f"tokens, beside the bare decoder forward; median of {content['rounds']} rounds, in turns:"
    )
    return [
        *textwrap.wrap(text, 100),
        "",
        *table(
            ("", "seconds a batch", "above the bare forward", "peak, GB", "its end, s"),
            (
                (
                    f"`simdiff score`, {name}" if name in content["share"] else name,
                    f"{seconds:.4f}",
                    f"{content['share'][name]:.2%}" if name in content["share"] else "",
                    f"{content['peak_bytes'][name] / 1e9:.2f}",
                    f"{content['finish_seconds'][name]:.2f}" if name in content["share"] else "",
                )
                for name, seconds in content["seconds"].items()
            ),
        ),
    ]


def _inference(content: dict[str, Any]) -> list[str]:
    setting = (
        f"LLaMA-3.1-8B's shape, random weights, bfloat16, {content['removed']} of "
        f"{content['shape']['num_hidden_layers']} layers removed, batch {content['batch_size']}, "
        f"prompt {content['prompt_length']}, {content['new_tokens']} new tokens, "
        f"{content['decoding']}; tokens/s:"
    )
    return [
        *textwrap.wrap(setting, 100),
        "",
        *table(
            ("", "dense", "pruned", "times faster", "ideal by bytes"),
            (
                (
                    phase,
                    *(
                        f"{content['tokens_per_second'][name][phase]:.0f}"
                        for name in ("dense", "pruned")
                    ),
                    f"{found['ratio']['median']:.3f}",
                    f"{found['ideal']:.3f}" if "ideal" in found else "",
                )
                for phase, found in content["phases"].items()
            ),
        ),
        "",
        f"The paper's ratio, with 2048 new tokens, is {PAPER_RATIO} on an A40.",
    ]


def _checks(content: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"compute-sanitizer, {found['case']}",
            f"{found['errors']} errors, {found['warnings']} warnings",
        )
        for found in of_part(content, "compute-sanitizer")
    ]
    for found in of_part(content, "tests"):
        failed = ", ".join(f"`{name.rpartition('/')[2]}`" for name in found["failed_tests"])
        ended = "" if found["ended"] else "; stopped at the end of the time, others had not run"
        rows.append(
            (
                f"tests, {found['case']}",
                f"{found['passed']} passed, "
                f"{len(found['failed_tests'])} failed{': ' if failed else ''}{failed}{ended}",
            )
        )
    rows += [
        (f"{entry['part']}, {entry['case']}", f"left out: {entry['why']}")
        for entry in content["left_out"]
    ]
    return table(("", "found"), rows)


def _goals(content: dict[str, Any]) -> list[str]:
    return table(
        ("goal", "wanted", "reached", "met"),
        (
            (
                goal.name,
                f"{'≤' if goal.at_most else '≥'} {goal.wanted:g}",
                "" if goal.reached is None else f"{goal.reached:.3g}",
                goal.met,
            )
            for goal in tables.goals(content["results"])
        ),
    )


if __name__ == "__main__":
    command(__doc__ or "", "measured", document)
