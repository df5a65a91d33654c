"""The figures of the README are those of the committed results, formatted anew from the files."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ratios
import report

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
Table = list[list[str]]


def tables(text: str) -> list[Table]:
    """Rows of cells, heads first, of all Markdown tables outside code."""
    found: list[Table] = [[]]
    for line in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
            found[-1].append([cell.strip() for cell in cells])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def table(*heads: str) -> Table:
    """The rows of the one table of the README with these heads, without them."""
    (found,) = (t for t in tables(README) if t[0] == list(heads))
    return found[1:]


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def rows(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stated(*texts: str) -> None:
    missing = [text for text in texts if text not in PROSE]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_have_as_many_cells_as_heads(page: Path) -> None:
    for head, *body in tables(page.read_text()):
        assert all(len(row) == len(head) for row in body), (head, body)


def test_accuracy() -> None:
    found = {
        (row["dtype"], row["distance"], row["way"]): float(row["worst error"])
        for row in rows("accuracy")
    }
    peers, ours = "1 - cosine_similarity", "ours, avx512"
    heads = ("distance", "float32, 1 − cosine_similarity", "bfloat16, same",
             "bfloat16, to float32 first", "float32, to float64 first",
             "bfloat16, to float64 first", "float32, ours", "bfloat16, ours")  # fmt: skip
    columns = [("float32", peers), ("bfloat16", peers), ("bfloat16", f"{peers}, float32"),
               ("float32", f"{peers}, float64"), ("bfloat16", f"{peers}, float64"),
               ("float32", ours), ("bfloat16", ours)]  # fmt: skip
    assert table(*heads) == [
        [f"1e-{n}", *(f"{found[dtype, f'1e-{n}', way]:.0e}" for dtype, way in columns)]
        for n in range(8)
    ]

    def worst(wanted: str) -> str:
        return f"{max(error for (_, _, way), error in found.items() if way == wanted):.0e}"

    stated(
        f"with AVX2 it is off by {worst('ours, avx2')} at most, with portable code by "
        f"{worst('ours, baseline')}.",
        f"Of states widened to float64 1 − cosine_similarity is off by "
        f"{worst(f'{peers}, float64')} at most",
    )


def test_accuracy_is_what_this_processor_has() -> None:
    """No instruction set is off by more than half a unit of the digit that stands in the README."""
    import accuracy

    known = {
        (row["dtype"], row["distance"], row["way"]): float(row["worst error"])
        for row in rows("accuracy")
    }
    limit: dict[str, float] = {}
    for (_, _, way), error in known.items():
        digit = 10.0 ** math.floor(math.log10(error))
        limit[way] = max(limit.get(way, 0.0), (round(error / digit) + 0.5) * digit)
    ways = {k: v for k, v in accuracy.ways().items() if k.startswith("ours") and k in limit}
    assert ways
    for row in accuracy.errors(ways):
        assert float(row["worst error"]) < limit[row["way"]], row


def test_demo() -> None:
    found = results("demo-epyc-2-cores")
    dense, pruned = found["dense"], found["pruned"]
    perplexity = [model["perplexity"] for model in (dense, pruned)]
    decode, prefill = ([m["speed"][p] for m in (dense, pruned)] for p in ("decode", "prefill"))
    sizes = [model["num_parameters"] / 1e6 for model in (dense, pruned)]

    def ratio(values: Sequence[float]) -> str:
        return f"{values[1] / values[0]:.2f}"

    assert table("", "dense", "pruned", "ratio") == [
        ["held-out perplexity", *(f"{p:.2f}" for p in perplexity), ratio(perplexity)],
        ["decode, tokens/s", *(f"{v:.1f}" for v in decode), ratio(decode)],
        ["prefill, tokens/s", *(f"{v:.0f}" for v in prefill), ratio(prefill)],
        ["parameters", *(f"{n:.1f} M" for n in sizes), ratio(sizes)],
    ]
    shown = [f"{values[1] / values[0]:.1f}" for values in (decode, prefill)]
    stated(f"without 7 of its 30 layers is {shown[0]} to {shown[1]} times faster",
           f"To remove 7 of the 30 layers ({7 / 30:.0%})")  # fmt: skip


TASKS = ("arc_easy", "piqa", "sciq", "hellaswag", "winogrande", "openbookqa")


def test_tasks() -> None:
    """From the items that both models were asked, of which each task has 100."""
    files = {"dense": "demo", "pruned": "demo/model"}
    scores = {
        name: results(f"tasks-{name}-epyc-2-cores")["models"][key]["tasks"]
        for name, key in files.items()
    }
    items = {
        name: {task: [int(bit) for bit in of[task]["items"]] for task in TASKS}
        for name, of in scores.items()
    }
    for task in TASKS:
        assert scores["dense"][task]["items_sha256"] == scores["pruned"][task]["items_sha256"]
    above = [task for task in TASKS if not scores["dense"][task]["at_chance"]]
    assert {*TASKS} - {*above} == {"winogrande", "openbookqa"}

    def mean(name: str, tasks: Sequence[str]) -> float:
        return statistics.fmean(statistics.fmean(items[name][task]) for task in tasks)

    def retained(tasks: Sequence[str]) -> str:
        ratio = mean("pruned", tasks) / mean("dense", tasks)
        variance = 0.0
        for task in tasks:
            pairs = zip(items["pruned"][task], items["dense"][task], strict=True)
            gaps = [after - ratio * before for after, before in pairs]
            variance += statistics.variance(gaps) / len(gaps)
        error = math.sqrt(variance) / len(tasks) / mean("dense", tasks)
        return f"{100 * ratio:.0f} ± {100 * error:.0f}%"

    assert table("", *TASKS, "average", "without tasks at chance") == [
        *(
            [
                name,
                *(f"{100 * mean(name, [task]):.0f}" for task in TASKS),
                *(f"{100 * mean(name, tasks):.1f}" for tasks in (TASKS, above)),
            ]
            for name in files
        ),
        ["retained", *[""] * len(TASKS), retained(TASKS), retained(above)],
    ]


def test_repair() -> None:
    found = results("recovery-distillation-epyc-2-cores")
    plain, repaired, dense = (
        found["quality"][name]["perplexity"] for name in ("pruned", "recovered", "dense")
    )
    share = math.log(plain / repaired) / math.log(plain / dense)
    training, seconds = found["details"]["training"], found["seconds"]
    stated(
        f"held-out perplexity {plain:.2f} after the plain cut, {repaired:.2f} repaired, "
        f"{dense:.2f} dense: {share:.0%} of the way back in log perplexity, in {seconds:.0f} s on "
        f"two cores, of which {seconds - training['seconds']:.0f} s for the closed form; training "
        f"read {training['curve'][-1]['tokens'] / 1000:.0f} thousand tokens",
        f"its held-out perplexity goes from {dense:.1f} to {plain:.1f}, and back to "
        f"{repaired:.1f} by {('five', 'six', 'seven')[round(seconds / 60) - 5]} minutes",
    )
    assert table(
        "layers removed", "dense", "plain cut", "repaired", "", "seconds, 2 cores"
    ) == [
        [
            row["removed"].replace("-", " to ").replace(",", ", "),
            *(f"{row['perplexity'][name]:.2f}" for name in ("dense", "pruned", "recovered")),
            f"−{1 - row['perplexity']['recovered'] / row['perplexity']['pruned']:.0%}",
            f"{row['seconds']:.0f}",
        ]
        for row in results("recovery-epyc-2-cores")["rows"]
    ]  # fmt: skip


def test_inference() -> None:
    wanted = []
    for name, label in (
        ("float32", "float32"), ("bfloat16", "bfloat16"), ("paper", "bfloat16, paper's"),
    ):  # fmt: skip
        for setting in results(f"inference-{name}-epyc-2-cores")["settings"]:
            cells = [label, str(setting["batch_size"])]
            for phase in ("prefill", "decode"):
                seconds = [setting[model]["seconds"][phase] for model in ("dense", "pruned")]
                ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
                found = setting["phases"][phase]
                assert ratio == pytest.approx(found["ratio"]["median"])
                cells += [ratios.shown(ratio, found["ratio"]), f"{ratio / found['ideal']:.2f}"]
            wanted.append(cells)
    heads = ("", "batch", "× prefill", "of the ideal", "× decode", "of the ideal")
    assert table(*heads) == wanted


def test_scoring() -> None:
    """The table is that of `report.py`, without the backend; times and ratios are of one run."""
    suite = results("suite-epyc-2-cores")
    heads, *wanted = tables(report.table(suite))[0]
    assert table(*heads[1:]) == [cells[1:] for cells in wanted]
    for case, cells in zip(report.scoring_cases(suite, "test_large_update"), wanted, strict=True):
        gigabytes = case["bytes"] / case["seconds"] / 1e9
        compiled = [v for k, v in case["times_faster"].items() if k.startswith("torch.compile")]
        assert cells[1:4] == [str(case["hidden_size"]), case["dtype"], f"{gigabytes:.1f}"]
        assert cells[4].startswith(f"{case['fraction_of_limit']:.2f}")
        assert cells[6].startswith(f"{min(compiled):.2f}")
    (rounds,) = {c.get("repeats", 7) for c in report.scoring_cases(suite, "test_large_update")}
    small = report.scoring_cases(suite, "test_small_update")
    one = [1e6 * case["seconds"] for case in small if case["tokens"] == 1]
    many = [1e6 * case["seconds"] for case in small
            if (case["tokens"], case["hidden_size"]) == (16, 4096)]  # fmt: skip
    eager = [case["times_faster"][report.fastest(case["times_faster"], "eager")] for case in small]
    passes = [case["extra_info"] for case in suite["benchmarks"] if "calibration" in case["name"]]
    told = []
    for case in passes:
        ends = case.get("interval", {}).get("ratio_to_bare", {})
        ours, shortgpt, pruneme = (
            ratios.shown(case["ratio_to_bare"][name], ends.get(name), 3)
            for name in ("ours", "hidden states and cosine", "float32 lists")
        )
        told.append(
            f"in {case['dtype']} takes {ours} times the bare one where layers are scored, "
            f"{pruneme} times as PruneMe does it and {shortgpt} times as ShortGPT does it, "
            "logits included"
        )
    stated(
        *told,
        f"medians of {rounds} interleaved rounds",
        f"An update of 1 token takes {min(one):.0f} to {max(one):.0f} µs there, one of 16 tokens "
        f"of 4096 entries {min(many):.0f} to {max(many):.0f} µs; eager PyTorch, in the same "
        f"rounds, takes {min(eager):.1f} to {max(eager):.1f} times as long.",
    )


def test_other_figures() -> None:
    quality = results("sublayers-epyc-2-cores")["quality"]
    by = {(row["unit"], row["removed"]): row["perplexity"]
          for row in quality if row.get("criterion") != "block-influence"}  # fmt: skip
    blocks = {case["dtype"]: case for case in results("blocks-epyc-2-cores")["benchmarks"]}
    (overhead,) = results("overhead-epyc-2-cores")
    surgery = results("checkpoint-surgery-epyc-2-cores")
    speeds = surgery["speed"]["ratios"]
    whole = {case["dtype"]: case["share_of_bare"] for case in results("pass-epyc-2-cores")}
    seconds = {dtype: case["seconds"]["ours"] for dtype, case in blocks.items()}
    eager, matmul = (
        {dtype: case["seconds"][name] / case["seconds"]["ours"] for dtype, case in blocks.items()}
        for name in ("eager", "compiled matmul")
    )
    error = max(case["error_of_matmul"]["squared_difference"] for case in blocks.values())
    shares = {dtype: case["seconds"]["ours"] / case["seconds"][f"{dtype} forward"]
              for dtype, case in blocks.items()}  # fmt: skip
    pairs, memory = overhead["ratio_of_pairs"], overhead["memory_above_bare_mb_of_pairs"]
    stated(
        f"dense {by['', 0]:.1f};",
        f"7 of 30 attention layers gone {by['attention', 7]:.1f}, 14 gone "
        f"{by['attention', 14]:.1f}; 7 MLPs gone {by['mlp', 7]:.0f}",
        f"All {blocks['float32']['pairs']} blocks of SmolLM2",
        f"take {1e3 * seconds['float32']:.0f} ms (bfloat16: {1e3 * seconds['bfloat16']:.0f})",
        f"spends {whole['float32']['with blocks']:.1%} of that float32 forward and "
        f"{whole['bfloat16']['with blocks']:.1%} of the bfloat16 one beside it, "
        f"{whole['float32']['layers']:.1%} and {whole['bfloat16']['layers']:.1%} without blocks",
        f"{shares['float32']:.1%} of the bare float32 forward and {shares['bfloat16']:.1%} of the "
        "bfloat16 one.",
        f"under torch.compile, take {matmul['float32']:.1f} times as long (bfloat16: "
        f"{matmul['bfloat16']:.1f} times) and are off by up to {error:.0e} in the squared "
        f"difference; eager PyTorch, pair by pair, takes {eager['float32']:.0f} times as long "
        f"(bfloat16: {eager['bfloat16']:.0f} times)",
        f"{overhead['seconds_in_update'] / overhead['bare_seconds']:.2%} of the bare forward",
        f"takes {statistics.median(pairs):.3f} times the bare time "
        f"(median of {len(pairs)}; single pairs lie between {min(pairs):.2f} and {max(pairs):.2f}",
        f"(−{-min(memory):.0f} to {max(memory):.0f} MB)",
        f"{surgery['memory']['checkpoint_gb']:.1f} GB with the shapes of a 70B model: "
        f"{surgery['memory']['added_peak_mb']:.0f} MB above",
        f"({surgery['memory']['command_peak_mb']:.0f} MB in all), and "
        f"{statistics.median(speeds):.2f} times the speed of `cp` on real bytes "
        f"({min(speeds):.2f} to {max(speeds):.2f} in {len(speeds)} rounds;",
    )


def test_classes_of_models() -> None:
    """Counted in the source of their test, which needs transformers."""
    tree = ast.parse((ROOT / "tests" / "toolkit" / "test_families.py").read_text())
    (families,) = (
        node.value for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAMILIES"
    )  # fmt: skip
    assert isinstance(families, ast.Dict)
    classes = [ast.unparse(value.elts[0]) for value in families.values
               if isinstance(value, ast.Tuple)]  # fmt: skip
    assert len(classes) == len(families.values)
    stated(f"run on {len(classes)} tiny models of {len({*classes})} classes")
