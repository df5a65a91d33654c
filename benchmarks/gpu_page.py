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

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
MEASURED = ROOT / "benchmarks" / "results" / "gpu-h200-2026-11-26.json"


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


def document() -> str:
    """The section `measured`."""
    content = measured()
    card, versions, limits = content["card"], content["versions"], content["limits"]
    copies = limits["copy_bytes_per_second"]
    where = (
        f"{card['name']} ({card['multiprocessors']} multiprocessors, {card['l2_megabytes']} MB L2, "
        f"{card['data_sheet_bytes_per_second'] / 1e12:.1f} TB/s by data sheet), "
        f"{content['date']}, commit {content['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f" ([results](../benchmarks/results/{MEASURED.name})). "
        f"Limits: a pure read {limits['read_bytes_per_second'] / 1e12:.2f} TB/s at "
        f"{limits['read_megabytes']} MB; a copy on the device "
        + ", ".join(f"{rate / 1e12:.3g} TB/s at {size}" for size, rate in copies.items())
        + "."
    )
    parts = [
        *textwrap.wrap(where, 100),
        "",
        "### An update of running scores, as a share of a pure read",
        "",
        *_updates(content["updates"]),
        "",
        "GB/s of one update beside PyTorch:",
        "",
        *_rates(content["gigabytes_per_second"]),
        "",
        *textwrap.wrap(_smallest(content), 100),
        "",
        "### Kernels that only read and sum, tried before they were written for good",
        "",
        *_prototypes(content["prototypes"]),
        "",
        "### What scoring adds to a calibration pass",
        "",
        *_calibration(content["calibration_pass"]),
        "",
        "### A pruned model's speed",
        "",
        *_inference(content["inference"]),
        "",
        "### Right or wrong",
        "",
        *_checks(content),
    ]
    return "\n".join(parts) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _updates(cases: Sequence[dict[str, Any]]) -> list[str]:
    return table(
        ("dtype", "hidden size", "tokens", "read, µs", "cuda", "triton"),
        (
            (
                case["dtype"],
                case["hidden_size"],
                case["num_tokens"],
                f"{case['read_microseconds']:g}",
                *(_share(case["share_of_read"][name]) for name in ("cuda", "triton")),
            )
            for case in cases
        ),
    )


def _rates(cases: Sequence[dict[str, Any]]) -> list[str]:
    columns = ("read", "cuda", "triton", "torch.compile", "torch.compile, max-autotune", "eager")
    return table(
        ("dtype", "hidden size", "tokens", *columns),
        (
            (
                case["dtype"],
                case["hidden_size"],
                case["num_tokens"],
                *(case.get(name, "") for name in columns),
            )
            for case in cases
        ),
    )


def _prototypes(cases: Sequence[dict[str, Any]]) -> list[str]:
    names = list(cases[0]["share_of_read"])
    return table(
        ("dtype", "hidden size", "tokens", *names),
        (
            (
                case["dtype"],
                case["hidden_size"],
                case["num_tokens"],
                *(_share(case["share_of_read"].get(name)) for name in names),
            )
            for case in cases
        ),
    )


def _smallest(content: dict[str, Any]) -> str:
    token, host = content["one_token_microseconds"], content["host_microseconds_per_update"]
    counters = content["counters"]
    return (
        f"An update by one token takes {token['cuda']} µs (cuda) and {token['triton']} µs "
        f"(triton), where a trivial kernel takes {token['a trivial kernel']}; it costs the host "
        f"{host['cuda']} and {host['triton']} µs. Counters of `{counters['kernel']}` at "
        f"{counters['num_tokens']} × {counters['hidden_size']} {counters['dtype']}: memory "
        f"{counters['dram_busy']:.0%} busy, multiprocessors {counters['sm_busy']:.0%}, "
        f"{counters['issued_per_scheduler_and_cycle']} instructions for each scheduler and cycle."
    )


def _calibration(content: dict[str, Any]) -> list[str]:
    sequences, length = content["tokens"]
    blocks = content["blocks_milliseconds"]
    rest = (
        f"By bytes alone an update per layer must cost {content['floor_share_of_forward']:.2%}. "
        f"All blocks of {blocks['states']} states take {blocks['cuda']} ms (cuda) and "
        f"{blocks['triton']} ms (triton) in one update, and {blocks['cuda, in the pass']} ms "
        "(cuda) inside the pass."
    )
    return [
        f"{content['model']} shape, {sequences} × {length} tokens, bare forward "
        f"{content['forward_seconds']} s; share of the bare forward:",
        "",
        *table(
            ("", "cuda", "triton"),
            (
                (
                    row["what"],
                    *(
                        f"{100 * row[name]:.3g}%" if name in row else ""
                        for name in ("cuda", "triton")
                    ),
                )
                for row in content["share_of_forward"]
            ),
        ),
        "",
        *textwrap.wrap(rest, 100),
    ]


def _inference(content: dict[str, Any]) -> list[str]:
    graphs, eager = content["graphs"], content["without_graphs"]
    setting = (
        f"{content['model']}, {content['dtype']}, {content['removed']} of {content['num_layers']} "
        f"layers removed, batch {content['batch_size']}, prompt {content['prompt_length']}, "
        f"{content['new_tokens']} new tokens; decoding in tokens/s:"
    )
    return [
        *textwrap.wrap(setting, 100),
        "",
        *table(
            ("", "dense", "pruned", "ratio", "ideal by bytes"),
            (
                (
                    "CUDA graphs",
                    graphs["dense"],
                    graphs["pruned"],
                    graphs["ratio"],
                    graphs["ideal_by_bytes"],
                ),
                (
                    "one launch after another",
                    eager["dense"],
                    eager["pruned"],
                    f"{eager['pruned'] / eager['dense']:.2f}",
                    "",
                ),
            ),
        ),
        "",
        f"Prefill is {content['prefill_ratio']} times faster. The paper's ratio is "
        f"{content['paper']['ratio']}, on an {content['paper']['card']}.",
    ]


def _checks(content: dict[str, Any]) -> list[str]:
    tests, run = content["tests"], content["run"]
    return table(
        ("", "found"),
        (
            ("tests of the operators", f"{tests['passed']} of {tests['run']} pass"),
            (
                "tests/kernels/test_gpu.py",
                f"{tests['gpu_tests_passed']} of {tests['gpu_tests']} pass",
            ),
            (
                "memcheck, initcheck, errors",
                f"{tests['memcheck_errors']}, {tests['initcheck_errors']}",
            ),
            ("racecheck, warnings", tests["racecheck_warnings"]),
            (
                "worst relative error of the distance, massive channel",
                f"{content['accuracy']['worst_relative_error']:.0e}",
            ),
            (
                "`simdiff run demo`: perplexity, dense and pruned",
                f"{run['perplexity']['dense']} and {run['perplexity']['pruned']}, as on the CPU",
            ),
            ("means of all metrics against the CPU", f"within {run['means_agree_to']:.0e}"),
            (
                "scoring, GPU and CPU",
                f"{run['scoring_seconds']['gpu']} s and {run['scoring_seconds']['cpu']} s",
            ),
        ),
    )


if __name__ == "__main__":
    command(__doc__ or "", "measured", document)
