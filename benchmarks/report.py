"""From pytest-benchmark's JSON to what people read: CSV, plot, table, comparison.

python benchmarks/report.py write RESULTS.json      # .csv and .png beside it, table printed
python benchmarks/report.py compare OLD.json NEW.json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    lines = [
        "| backend | hidden size | dtype | GB/s | of a pure read | × eager | × torch.compile "
        "| × float32 cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in scoring_cases(results, "test_large_update"):
        faster = case["times_faster"]
        others = [faster.get(name) for name in ("eager", "torch.compile", "float32 cosine")]
        cells = [case["backend"], case["hidden_size"], case["dtype"]]
        cells += [f"{case['gb_per_second']:.1f}", f"{case['fraction_of_limit']:.2f}"]
        cells += ["" if ratio is None else f"{ratio:.1f}" for ratio in others]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "| tokens | hidden size | dtype | update, µs | × eager |",
        "|---|---|---|---|---|",
    ]
    for result in results["benchmarks"]:
        if result["name"].startswith("test_small_update["):
            # The calls of one after the other, not those interleaved with what empties the caches.
            case, median = result["extra_info"], result["stats"]["median"]
            cells = [case["tokens"], case["hidden_size"], case["dtype"], f"{1e6 * median:.1f}"]
            cells.append(f"{case['times_faster']['eager']:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    passes = [c["extra_info"] for c in results["benchmarks"] if "calibration" in c["name"]]
    lines += [
        "",
        "| calibration pass | ours | hidden states and cosine | float32 lists |",
        "|---|---|---|---|",
    ]
    for case in passes:
        ratios = case["ratio_to_bare"]
        names = ("ours", "hidden states and cosine", "float32 lists")
        cells = " | ".join(f"{ratios[name]:.3f}" for name in names)
        lines.append(f"| {case['model']}, {case['dtype']}, {case['tokens']} | {cells} |")
    lines += ["", "| layers removed | prefill | ideal | decode | ideal |", "|---|---|---|---|---|"]
    for case in [c["extra_info"] for c in results["benchmarks"] if "inference" in c["name"]]:
        cells = [f"{case['removed']} of {case['num_layers']}"]
        for phase in ("prefill", "decode"):
            cells += [f"{case['speedup'][phase]:.2f}", f"{case['ideal'][phase]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
            sizes = [str(case["hidden_size"]) for case in mine]
            label = f"{backend}, {dtype}"
            left.plot(sizes, [c["fraction_of_limit"] for c in mine], "o-", color=color, label=label)
            for name, style in (("eager", "o-"), ("torch.compile", "s--")):
                ratios = [case["times_faster"].get(name) for case in mine]
                if None not in ratios:
                    right.plot(sizes, ratios, style, color=color, label=f"{name}, {dtype}")
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
    commands.add_parser("write").add_argument("results", type=Path)
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
    for case in results["benchmarks"]:
        case["stats"].pop("data", None)  # single times: most of the file, and nobody reads them
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    write_csv(results, arguments.results.with_suffix(".csv"))
    plot(results, arguments.results.with_suffix(".png"))
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
