"""Figures of the pages are those of the committed results, no others."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import effort_tables
import figure_sections
import figures
import pytest
import quality_tables
import scorer_sections
from committed_results import Results

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Those on which no measured number may be typed.
TYPED = [page for page in PAGES if page.name not in ("CHANGELOG.md", "figures.md", "gpu.md")]
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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with all results, to change."""
    return Path(shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results"))


def test_pages_are_what_the_results_say() -> None:
    assert figures.differences(Results()) == [], "python benchmarks/figures.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_have_as_many_cells_as_heads(page: Path) -> None:
    for head, *body in tables(page.read_text()):
        assert all(len(row) == len(head) for row in body), (head, body)


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.name)
def test_measured_numbers_are_in_blocks(page: Path) -> None:
    """Every number with a decimal point or an exponent of a figure; code and versions apart."""
    number = r"(?<![\w.])(?:\d+\.\d+|\de[-+]\d\d)(?!\w|\.\d)"
    typed = figures.without_blocks(page.read_text())
    # Computed by benchmarks/large_models.py, which test_large_models.py compares.
    typed = re.sub(r"<!-- large models -->.*?<!-- end -->", "", typed, flags=re.DOTALL)
    typed = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", typed, flags=re.DOTALL)
    kinds = "torch|transformers|Python|Triton|CUDA|glibc|numpy|NumPy below|to|arXiv"
    version = rf"(?:{kinds}) \d[\d.]*|Apache-2\.0"
    typed = re.sub(rf"{version}|\w+-[\d.]+B\b", "", typed)  # SmolLM-1.7B is a name
    measured = set(re.findall(number, figures.page(Results())))
    perplexities = tables(figures.results(Results()))[0][1][1:3]
    assert {*perplexities, "2e-07"} <= measured
    assert measured & set(re.findall(number, typed)) == set()


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


ALTERED: dict[str, tuple[list[str | int], Any, str]] = {
    "demo-epyc-2-cores": (["pruned", "perplexity"], 48.993, "| 48.99 |"),
    "recovery-distillation-epyc-2-cores": (["quality", "recovered", "perplexity"], 27.771, "27.77"),
    "recovery-epyc-2-cores": (["rows", 1, "perplexity", "recovered"], 34.441, "| 34.44 |"),
    "sublayers-epyc-2-cores": (["quality", 1, "perplexity"], 126.6661, "126.7"),
    "quantised-epyc-2-cores": (
        ["kinds", 0, "metrics", "cosine_distance", "rank_correlation"],
        0.87654,
        "0.8765",
    ),
    "suite-epyc-2-cores": (["benchmarks", 9, "extra_info", "gb_per_second"], 131.2345, "| 131.2 |"),
    "blocks-epyc-2-cores": (["benchmarks", 0, "pairs"], 466, "All 466 blocks"),
    "pass-epyc-2-cores": ([1, "share_of_bare", "layers"], 0.0777, "7.8% without blocks"),
    "overhead-epyc-2-cores": ([0, "ratio_of_pairs", 0], 1.777, "and 1.78"),
    "checkpoint-surgery-epyc-2-cores": (["memory", "command_peak_mb"], 477.7, "(478 MB in all)"),
    "search-epyc-2-cores": (["ratio"], 1.777, "1.78 times as long"),
    "gpu-h200-2026-11-27": (["results", 18, "share", "blocks off"], 0.0777, "7.77% longer"),
    "development-smollm2-135m-python": (["settings", "dtype"], "float64", "or float64"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_another_number_in_a_result_is_another_on_the_page(copy: Path, name: str) -> None:
    keys, value, text = ALTERED[name]

    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        assert content[keys[-1]] != value
        content[keys[-1]] = value

    before = " ".join(figures.page(Results(copy)).split())
    change(copy / f"{name}.json", edit)
    after = " ".join(figures.page(Results(copy)).split())
    assert text in after
    assert text not in before
    assert figures.differences(Results(copy)) != []


def test_a_block_of_the_readme_follows_its_result(copy: Path) -> None:
    def edit(content: Any) -> None:
        content["pruned"]["perplexity"] = 48.993

    change(copy / "demo-epyc-2-cores.json", edit)
    assert "| 48.99 |" in figures.written(Results(copy))[figures.README]


def test_times_of_the_guide_follow_the_rate(copy: Path) -> None:
    """A billion parameters, 16,384 tokens, two operations each."""

    def edit(content: Any) -> None:
        (one,) = (entry for entry in content if entry["dtype"] == "bfloat16")
        layers = 30 * (134_515_008 - 109_734_336) / 7  # of the demo: all less seven, by seven
        one["bare_seconds"] = 2 * layers * 8 * 512 / 1e11  # 100 · 10⁹ operations a second

    demo = json.loads((copy / "demo-epyc-2-cores.json").read_text())
    assert len(demo["removed"]) == 7
    change(copy / "pass-epyc-2-cores.json", edit)
    guide = figures.written(Results(copy))[figures.GUIDE]
    assert "100 · 10⁹ a second (two CPU cores)" in " ".join(guide.split())
    assert "| 1 billion parameters | 5.5 min | 11 min |" in guide  # 2e9 · 16384 / 1e11 = 328 s


def test_a_repair_stands_beside_the_demo_only_if_of_its_windows(copy: Path) -> None:
    demo = json.loads((copy / "demo-epyc-2-cores.json").read_text())

    def measured_with(dense: float) -> Callable[[Any], None]:
        def edit(content: Any) -> None:
            content["quality"]["dense"]["perplexity"] = dense
            content["quality"]["pruned"]["perplexity"] = demo["pruned"]["perplexity"]
            content["quality"]["recovered"]["perplexity"] = 12.3456

        return edit

    name = "recovery-distillation-epyc-2-cores.json"
    change(copy / name, measured_with(demo["dense"]["perplexity"]))
    typed = figures.README.read_text()
    readme = " ".join(figures.with_blocks(typed, Results(copy)).split())
    assert "and back to 12.3 by" in readme
    assert "| ratio | repaired, distillation |" in readme
    assert "| 12.35 |" in readme
    assert f"results/{name})" in readme
    change(copy / name, measured_with(1.01 * demo["dense"]["perplexity"]))
    assert "| 12.35 |" not in figures.with_blocks(typed, Results(copy))


def test_both_kinds_of_tasks_stand_in_the_readme_or_none(copy: Path) -> None:
    """100 items of two tasks that are written: right are 40 and 2, then 10 and 1, then 20 and 4."""
    name = "tasks-epyc-2-cores.json"
    typed = figures.README.read_text()
    assert "classification" not in figures.with_blocks(typed, Results(copy))
    right = {"sums": (40, 10, 20), "trivia": (2, 1, 4)}

    def edit(content: Any) -> None:
        for task, of in right.items():
            content["tasks"]["tasks"][task] = {"num_fewshot": 5, "max_new_tokens": 12}
            for model, count in zip(content["models"].values(), of, strict=True):
                model["tasks"][task] = {
                    "chance": 0.0,
                    "at_chance": task == "trivia",
                    "items_sha256": "a",
                    "items": "1" * count + "0" * (100 - count),
                }

    change(copy / name, edit)
    demo = json.loads((copy / "demo-epyc-2-cores.json").read_text())["dense"]["perplexity"]
    readme = figures.with_blocks(typed, Results(copy))
    ((head, *rows),) = [
        found for found in tables(readme) if found[1][:2] == ["held-out perplexity", f"{demo:.2f}"]
    ]
    assert [row[:4] for row in rows[-2:]] == [
        ["classification, 4 tasks, average %", "54.2", "51.2", "0.94"],
        ["generation, 1 task, average %", "40.0", "10.0", "0.25"],
    ]
    assert [row[4:] for row in rows[-2:]] in ([[], []], [["52.2"], ["20.0"]])
    assert len(head) == len(rows[-1])
    assert f"results/{name})" in readme
    page = figures.page(Results(copy))
    (written,) = [found for found in tables(page) if found[0][0] == "generation"]
    assert written[:5] == [
        ["generation", "sums", "trivia", "average", "without tasks near 0"],
        ["dense", "40", "2", "21.0", "40.0"],
        ["pruned", "10", "1", "5.5", "10.0"],
        ["repaired", "20", "4", "12.0", "20.0"],
        # 5.5 / 21 with an error of 0.0682, and 10 / 40 with one of 0.0688, by the delta method.
        ["pruned, retained", "", "", "26 ± 7%", "25 ± 7%"],
    ]
    assert "next to no right answer in trivia" in page
    assert "Solved examples before each item: sums 5, trivia 5" in " ".join(page.split())


def test_every_result_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or is what a file that is read was drawn or tabulated from."""
    read = set()

    def text(self: Results, name: str) -> str:
        read.add(name)
        return (self.folder / name).read_text()

    monkeypatch.setattr(Results, "_text", text)
    results = Results()
    page = figures.page(results)
    protocol = (*results.quality, *results.development, *results.effort)
    read |= {path.name for subject in protocol for path in subject.files} | {*results.calibration}
    files = {path.name for path in results.folder.iterdir()}
    assert {name for name in files - read if f"results/{name})" not in page} == set()
    assert {name for name in files - read if not name.endswith((".png", ".csv"))} == set()


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "sublayers-epyc-2-cores.json").unlink()
    with pytest.raises(SystemExit, match=r"must hold sublayers-epyc-2-cores\.json"):
        figures.page(Results(copy))


def test_blocks_of_the_readme_are_known() -> None:
    text = figures.README.read_text().replace("<!-- figures results", "<!-- figures result")
    with pytest.raises(SystemExit, match="must have the blocks"):
        figures.with_blocks(text, Results())


def test_the_page_says_what_is_older(copy: Path) -> None:
    def edit(content: Any) -> None:
        for entry in content["results"].values():
            entry.pop("shown_as", None)
        content["results"]["accuracy.csv"]["shown_as"] = "errors (1234567)"

    change(copy / "manifest.json", edit)
    told = " ".join(figure_sections.older(Results(copy)).split())
    assert told.endswith("Older than that code, and not measured anew: errors (1234567).")


# Two seeds of two windows. Losses of the way less those of `simdiff + reads`: 0.1 and 0.3, 0.2 and
# 0.6. Means 0.2 and 0.4, together 0.3; variances 0.02 and 0.08; standard error
# sqrt(0.02 / 2 + 0.08 / 2) / 2 = 0.1118; 1 + 1 degrees of freedom, t = 4.303.
WAY, OTHER = "block-influence", "greedy perplexity, 1 windows"
HELD_OUT = {
    1: {"dense": [1.0, 1.0], "1": [2.0, 2.0], "2": [2.1, 2.3], "3": None},
    2: {"dense": [1.0, 3.0], "1": [3.0, 1.0], "2": [3.2, 1.6]},
}


def row(way: str, layers: str | None, problem: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "way": way,
        "removed": 1,
        "layers": layers,
        "windows_read": 3,
        "seconds": 4.4,
        "problem": problem,
    } | more


def quality_file(path: Path, rows: dict[int, list[dict[str, Any]]], sha256: str = "a") -> None:
    seeds = [
        {
            "seed": seed,
            "documents_sha256": f"{sha256}{seed}",
            "licence": "free",
            "rows": of,
            "held_out_losses": HELD_OUT[seed],
        }
        for seed, of in rows.items()
    ]
    settings = {
        "text": "wikipedia",
        "pool": "reporting",
        "windows": 16,
        "window_length": 512,
        "held_out_windows": 2,
        "held_out_length": 256,
        "dtype": "bfloat16",
    }
    path.write_text(
        json.dumps(
            {
                "model": {
                    "name": "tiny",
                    "converted_from": {"file": "tiny.gguf", "sha256": "0" * 64},
                },
                "settings": settings,
                "machine": "a machine",
                "threads": 1,
                "commit": "1" * 12,
                "seeds": seeds,
            }
        )
    )


@pytest.fixture
def made_up(tmp_path: Path) -> quality_tables.Subject:
    ours = row(quality_tables.OURS, "1")
    quality_file(
        tmp_path / "quality-tiny.json",
        {
            1: [ours, row(WAY, "2"), row("simdiff", "1"), row("random", "3", "refused")],
            2: [ours, row(WAY, "2", windows_read=9), row("simdiff", "1")],
        },
    )
    quality_file(tmp_path / "quality-tiny-all.json", {1: [row(OTHER, "2"), row(WAY, "1")]})
    (subject,) = quality_tables.load(tmp_path, "quality")
    return subject


def test_ratio_pools_windows_of_all_seeds(made_up: quality_tables.Subject) -> None:
    found = quality_tables.ratio(made_up, WAY, 1)
    reach = 4.302653 * math.sqrt(0.02 / 2 + 0.08 / 2) / 2
    wanted = [math.exp(0.3 + sign * reach) for sign in (0, -1, 1)]
    assert found is not None
    assert [found.value, found.low, found.high] == pytest.approx(wanted, rel=1e-6)
    alone = quality_tables.ratio(made_up, OTHER, 1)  # seed 1: 0.2, error 0.1, t = 12.706
    assert alone is not None
    assert [alone.low, alone.high] == pytest.approx(
        [math.exp(0.2 - 1.270620), math.exp(0.2 + 1.270620)], rel=1e-6
    )


def test_table_of_ways(made_up: quality_tables.Subject) -> None:
    ((heads, *found),) = tables("\n".join(quality_tables.way_table(made_up, 1)))
    assert heads[2] == "with seed 1 / 2"
    by = {cells[0]: cells[1:] for cells in found}
    e = math.exp
    assert by == {
        "dense": [f"{e(1.5):.1f}", f"{e(1):.1f} / {e(2):.1f}", "", "", ""],
        quality_tables.OURS: [f"{e(2):.1f}", f"{e(2):.1f} / {e(2):.1f}", "1", "3", "4"],
        "simdiff": [f"{e(2):.1f}", f"{e(2):.1f} / {e(2):.1f}", "same plan", "3", "4"],
        WAY: [
            f"{e(2.3):.1f}",
            f"{e(2.2):.1f} / {e(2.4):.1f}",
            "1.35 [0.83, 2.18], not distinguishable",
            "3 to 9",
            "4",
        ],
        "greedy perplexity, 1 window": [
            "-",
            f"{e(2.2):.1f} / -",
            "1.22 [0.34, 4.35], not distinguishable (seed 1)",
            "3",
            "4",
        ],
        "random": ["-", "refused / -", "-", "3", "4"],
    }
    assert found[-1][0] == "random"


def test_what_is_said_of_all_tables(made_up: quality_tables.Subject) -> None:
    assert quality_tables.less_often([made_up])[2:] == [
        "| way | tiny, wikipedia |",
        "|---|---|",
        "| greedy perplexity, 1 window | 1 |",
        "| random | 1 |",
    ]
    fewer = replace(made_up, seeds=made_up.seeds[1:])
    assert "| random | 1 | - |" in quality_tables.less_often([made_up, fewer])
    assert any(row.endswith("| all | 2 |") for row in quality_tables.less_often([made_up, fewer]))
    assert "Seeds 1, 2, each" in quality_tables.protocol([made_up])
    assert quality_tables.better_ways([made_up]) == []
    assert quality_tables.costs([made_up], OTHER) == {
        "windows_read": ("3", "3"),
        "seconds": ("4", "4"),
    }
    ((_, summary),) = tables("\n".join(quality_tables.summary([made_up])))
    assert summary[:4] == ["tiny", "wikipedia", "1, 2", "1 (10%)"]


def test_ablations_count_cases(tmp_path: Path) -> None:
    """Those that read are compared with `simdiff + reads`, the others with `simdiff`."""
    ours, plain = row(quality_tables.OURS, "1"), row("simdiff", "2")
    parts = [row("simdiff + reads, p = 1", "2"), row("simdiff, p = 1", "2")]
    quality_file(tmp_path / "quality-a.json", {2: [ours, plain, *parts]})
    quality_file(tmp_path / "quality-b.json", {2: [ours, plain, row(parts[0]["way"], "1")]})
    found = quality_tables.ablations(
        quality_tables.load(tmp_path, "quality"), quality_tables.ABLATIONS.__contains__
    )
    assert tables("\n".join(found))[0][1:] == [
        ["simdiff + reads, p = 1", "2", "1", "0", "0", "1", "1.49 to 1.49"],
        ["simdiff, p = 1", "1", "1", "0", "0", "0", ""],
    ]


def test_files_of_other_documents_are_not_joined(
    made_up: quality_tables.Subject, tmp_path: Path
) -> None:
    quality_file(tmp_path / "quality-tiny-all.json", {1: [row(OTHER, "2")]}, sha256="b")
    with pytest.raises(ValueError, match=r"quality-tiny-all.json: must be of one model"):
        quality_tables.load(tmp_path, "quality")


def test_quality_is_on_the_pages_where_there_are_results(
    made_up: quality_tables.Subject, copy: Path
) -> None:
    for path in (*copy.glob("quality-*.json"), *copy.glob("effort-*.json")):
        path.unlink()
    without = figures.written(Results(copy))
    assert "How good the plans are" not in without[figures.PAGE]
    for path in made_up.files:
        shutil.copy(path, copy)
    with pytest.raises(SystemExit, match=r"must have an entry for quality-tiny\.json"):
        figures.page(Results(copy))

    def edit(content: Any) -> None:
        for path in made_up.files:
            content["results"][path.name] = content["results"]["accuracy.csv"]

    change(copy / "manifest.json", edit)
    found = figures.written(Results(copy))
    assert "### tiny, wikipedia" in found[figures.PAGE]
    assert "| tiny | wikipedia | 1, 2 | 1 (10%) | 1.35 [0.83, 2.18]" in found[figures.PAGE]
    assert "small models alone (tiny)" in " ".join(found[figures.LIMITS].split())


def test_efforts_stand_beside_the_ways_of_the_protocol(copy: Path) -> None:
    """Each file belongs to the quality protocol's windows, or it is refused."""
    efforts = Results(copy).effort
    page = " ".join(figures.page(Results(copy)).split())
    subject = next(s for s in efforts if s.model == "gemma-3-270m")
    found = quality_tables.ratio(subject, "effort thorough", 2, effort_tables.BASE)
    assert found is not None
    assert f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] (seed 1)" in page
    path = next(copy.glob("effort-gemma-*-1.json"))

    def edit(content: Any) -> None:
        content["seeds"][0]["held_out_losses"]["dense"][0] += 0.1

    change(path, edit)
    with pytest.raises(ValueError, match="seed 1 must be of the windows of quality-"):
        _ = Results(copy).effort


def test_accuracy_is_what_this_processor_has() -> None:
    """No instruction set is off by more than half a unit of the digit that stands on the page."""
    import accuracy

    limit: dict[str, float] = {}
    for (_, _, way), error in scorer_sections.accuracy_errors(Results()).items():
        digit = 10.0 ** math.floor(math.log10(error))
        limit[way] = max(limit.get(way, 0.0), (round(error / digit) + 0.5) * digit)
    ways = {k: v for k, v in accuracy.ways().items() if k.startswith("ours") and k in limit}
    assert ways
    for found in accuracy.errors(ways):
        assert float(found["worst error"]) < limit[found["way"]], found


def test_classes_of_models() -> None:
    """Counted in the source of their table, whose module needs transformers."""
    tree = ast.parse((ROOT / "tests" / "simdiff" / "support" / "families.py").read_text())
    (families,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAMILIES"
    )
    assert isinstance(families, ast.Dict)
    classes = [
        ast.unparse(value.elts[0]) for value in families.values if isinstance(value, ast.Tuple)
    ]
    assert len(classes) == len(families.values)
    told = f"run on {len(classes)} tiny models of {len({*classes})} classes"
    assert told in " ".join((ROOT / "docs" / "checkpoints.md").read_text().split())
