"""From pytest-benchmark's JSON to what people read: CSV, plot, table, comparison.

python benchmarks/report.py write RESULTS.json      # .csv and .png beside it, tables printed
python benchmarks/report.py write RESULTS.json --output benchmarks/results/suite-NAME    # kept
python benchmarks/report.py compare OLD.json NEW.json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import provenance
import ratios

# What the suite measures, in the words of `provenance.SOURCES`.
SOURCES = ("cpu scorers", "calibration pass", "speed")
# A case is slower when its median rose by more than this and by more than both spreads.
SLOWER = 1.05


def load(path: Path) -> dict[str, Any]:
    """A result file of pytest-benchmark; a ValueError says what is wrong with another."""
    results = json.loads(path.read_text())
    if "benchmarks" not in results or "machine_info" not in results:
        raise ValueError(f"{path} must be a JSON file of pytest-benchmark, got {list(results)}")
    return results


def flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested numbers and words as dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix, "; ".join(map(str, value))
    else:
        yield prefix, value


def tidy(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per case and quantity."""
    rows = []
    for case in results["benchmarks"]:
        quantities = {
            f"time.{key}": case["stats"][key] for key in ("median", "min", "max", "rounds")
        }
        for name, value in (*quantities.items(), *flatten("", case["extra_info"])):
            rows.append(
                {"group": case["group"], "case": case["name"], "quantity": name, "value": value}
            )
    return rows


def write_csv(results: dict[str, Any], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["group", "case", "quantity", "value"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(tidy(results))


def scoring_cases(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What `test_large_update` or `test_small_update` measured."""
    return [c["extra_info"] for c in results["benchmarks"] if c["name"].startswith(f"{name}[")]


def fastest(times_faster: Mapping[str, float], kind: str) -> str | None:
    """Of the forms of `eager` or `torch.compile`, the name of the one that is least behind ours."""
    forms = [name for name in times_faster if name in (kind, f"{kind}, one pass")]
    return min(forms, key=lambda name: times_faster[name], default=None)


PEERS = ("float32 cosine", "block influence")


def compared(case: dict[str, Any], *columns: str) -> list[str]:
    """Cells of how many times faster ours is: the fastest form of each, with its interval."""
    faster, intervals = case["times_faster"], case.get("interval", {}).get("times_faster", {})
    names = [fastest(faster, name) or name for name in columns]
    return [ratios.shown(faster.get(name), intervals.get(name)) for name in names]


def intervals_in_words(results: dict[str, Any]) -> str:
    """What stands in brackets beside ratios; nothing where the results have no intervals."""
    coverage = [
        value
        for case in results["benchmarks"]
        for name, value in flatten("", case["extra_info"].get("interval", {}))
        if name.endswith("coverage")
    ]
    if not coverage:
        return ""
    return f"Ratios: {ratios.METHOD} with probability {min(coverage):.2f} or more"


LARGE_UPDATE = (
    "hidden size",
    "dtype",
    "GB/s",
    "of a pure read",
    "× eager",
    "× torch.compile",
    *(f"× {name}" for name in PEERS),
)


def large_update(case: dict[str, Any]) -> list[str]:
    """Cells of one case of `test_large_update`, of the columns LARGE_UPDATE."""
    limit = case.get("interval", {}).get("fraction_of_limit")
    return [
        str(case["hidden_size"]),
        case["dtype"],
        f"{case['gb_per_second']:.1f}",
        ratios.shown(case["fraction_of_limit"], limit),
        *compared(case, "eager", "torch.compile", *PEERS),
    ]


def origin(results: dict[str, Any]) -> str:
    """One paragraph: the machine, the commit, and what is to be said against the results."""
    commit, suite = results.get("commit_info", {}), results.get("suite", {})
    text = f"{results['machine_info']['machine']}; commit {(commit.get('id') or 'unknown')[:12]}"
    text += ", **with uncommitted changes**" if commit.get("dirty", True) else ", clean tree"
    if suite.get("quick"):
        text += "; **tiny cases, which tell nothing about speed**"
    if suite.get("missing"):
        text += (
            f"; **not complete, {len(suite['missing'])} missing: {', '.join(suite['missing'])}**"
        )
    if words := intervals_in_words(results):
        text += f". {words}"
    return f"{text}."


def table(results: dict[str, Any]) -> str:
    """All tables, below where they come from."""
    lines = [origin(results), "", *_head(("backend", *LARGE_UPDATE))]
    for case in scoring_cases(results, "test_large_update"):
        lines.append(f"| {case['backend']} | {' | '.join(large_update(case))} |")
    lines += [
        "",
        *_head(("tokens", "hidden size", "dtype", "update, µs", "× eager", "× torch.compile")),
    ]
    for case in scoring_cases(results, "test_small_update"):
        cells = [case["tokens"], case["hidden_size"], case["dtype"], f"{1e6 * case['seconds']:.1f}"]
        cells += compared(case, "eager", "torch.compile")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    by_name = {
        name: [c["extra_info"] for c in results["benchmarks"] if name in c["name"]]
        for name in ("all_blocks", "calibration", "inference")
    }
    lines += [
        "",
        *_head(
            (
                "all blocks",
                "ours, ms",
                "× eager",
                "× batched matmul",
                "× compiled matmul",
                "of its forward",
            )
        ),
    ]
    for case in by_name["all_blocks"]:
        intervals = case.get("interval", {})
        share = case["share_of_forward"][case["dtype"]]
        of_forward = intervals.get("share_of_forward", {}).get(case["dtype"])
        cells = [f"{case['model']}, {case['dtype']}, {case['tokens']}"]
        cells += [f"{1e3 * case['seconds']['ours']:.1f}"]
        cells += compared(case, "eager", "batched matmul", "compiled matmul")
        cells += [ratios.shown(share, of_forward, "percent")]
        lines.append(f"| {' | '.join(cells)} |")
    names = ("ours", "hidden states and cosine", "float32 lists")
    lines += ["", *_head(("calibration pass", *names))]
    for case in by_name["calibration"]:
        intervals = case.get("interval", {}).get("ratio_to_bare", {})
        cells = [f"{case['model']}, {case['dtype']}, {case['tokens']}"]
        cells += [ratios.shown(case["ratio_to_bare"][n], intervals.get(n), 3) for n in names]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_head(("layers removed", "prefill", "ideal", "decode", "ideal"))]
    for case in by_name["inference"]:
        intervals = case.get("interval", {}).get("speedup", {})
        cells = [f"{case['removed']} of {case['num_layers']}"]
        for phase in ("prefill", "decode"):
            cells += [ratios.shown(case["speedup"][phase], intervals.get(phase))]
            cells += [f"{case['ideal'][phase]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(heads: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of the memory's limit by hidden size, and how much slower others are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cases = scoring_cases(results, "test_large_update")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {"float32": "#5b7083", "bfloat16": "#c8442d", "float16": "#d8a13a"}
    for backend in sorted({case["backend"] for case in cases}):
        for dtype, color in colors.items():
            mine = [c for c in cases if (c["backend"], c["dtype"]) == (backend, dtype)]
            if not mine:  # else the legend names what was not measured
                continue
            sizes = [str(case["hidden_size"]) for case in mine]
            label = f"{backend}, {dtype}"
            left.plot(sizes, [c["fraction_of_limit"] for c in mine], "o-", color=color, label=label)
            for kind, style in (("eager", "o-"), ("torch.compile", "s--")):
                names = [fastest(case["times_faster"], kind) for case in mine]
                if None not in names:
                    times = [c["times_faster"][n] for c, n in zip(mine, names, strict=True)]
                    right.plot(sizes, times, style, color=color, label=f"{kind}, {dtype}")
    left.axhline(1, color="#1b1f24", linewidth=0.8)
    left.set(ylabel="share of the memory's limit", xlabel="hidden size", ylim=(0, None))
    right.set(ylabel="times our time", xlabel="hidden size", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(axis="y", color="#d9dee3")
    figure.suptitle(results["machine_info"]["machine"], fontsize="medium")
    figure.savefig(path, dpi=110)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per case that got slower, or that is gone."""
    before = {case["fullname"]: case["stats"] for case in old["benchmarks"]}
    after = {case["fullname"]: case["stats"] for case in new["benchmarks"]}
    lines = []
    for name, then in before.items():
        now = after.get(name)
        if now is None:
            lines.append(f"{name}: not measured any more")
        elif now["median"] > SLOWER * then["median"] and now["q1"] > then["q3"]:
            ratio = now["median"] / then["median"]
            lines.append(
                f"{name}: {ratio:.2f} times slower "
                f"({1e3 * then['median']:.3g} ms before, {1e3 * now['median']:.3g} ms now)"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("results", type=Path)
    writing.add_argument("--output", type=Path, help="without .json, .csv and .png")
    comparison = commands.add_parser("compare")
    comparison.add_argument("old", type=Path)
    comparison.add_argument("new", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "compare":
            lines = compare(load(arguments.old), load(arguments.new))
            print("\n".join(lines) or "nothing got slower")
            return 1 if lines else 0
        results = load(arguments.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    output = arguments.output or arguments.results.with_suffix("")
    files = [output.with_name(f"{output.name}.{kind}") for kind in ("json", "csv", "png")]
    suite = results.get("suite", {})
    if suite.get("quick") and provenance.is_result(files[0]):
        print(f"{arguments.results} holds tiny cases: no result", file=sys.stderr)
        return 2
    for case in results["benchmarks"]:
        case["stats"].pop("data", None)  # single times: most of the file, and nobody reads them
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    write_csv(results, files[1])
    plot(results, files[2])
    if "origin" in suite:
        origin_of_run = suite["origin"] | {"machine": results["machine_info"]["machine"]}
        provenance.keep(files, SOURCES, command=suite["command"], origin=origin_of_run)
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
