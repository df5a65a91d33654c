"""`simdiff report` as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from simdiff.io.json_files import write_json
from support.commands import simdiff
from support.pages import Structure


def test_the_command_joins_a_benchmark(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    out, page, bench = tmp_path / "out", tmp_path / "page.html", tmp_path / "b.json"
    small = ("--num-windows", "4", "--window-length", "16")

    assert (
        simdiff("run", tiny_checkpoint, "--text", tiny_text, *small, "--ratio", 0.4, "-o", out) == 0
    )
    tables = {"run": capsys.readouterr().out}
    quick = ("--prompt-lengths", 8, "--new-tokens", 4, "--repeats", 2, "--warm-up", 0)
    plan = ("--plan", out / "plan.json")
    draft = ("--draft", "--text", tiny_text)
    assert simdiff("bench", tiny_checkpoint, *plan, *quick, *draft, "-o", bench) == 0
    tables["bench"] = capsys.readouterr().out
    assert simdiff("report", out, "--bench", bench, "-o", page) == 0
    assert "from plan, scores, results, bench" in " ".join(capsys.readouterr().out.split())
    measured = json.loads(bench.read_text())["settings"][0]
    text = Structure(page.read_text()).text
    assert 'AutoTokenizer.from_pretrained("out/model")' in text, "seen from the page"
    assert "the others are as they were" in text
    for phase in ("prefill", "decode"):
        found = measured["phases"][phase]
        assert f"{found['ideal']:.3f} {100 * found['share_of_ideal']:.1f}%" in text
    whole = tables["run"].partition("Before and after")[2].partition("parameters")[0]
    own = Structure((out / "report.html").read_text()).text
    for told, where in ((whole, own), (tables["bench"].partition("Draft")[2], text)):
        numbers = re.findall(r"\d+\.\d+|\b\d{3,}\b", told.replace(",", ""))
        assert len(numbers) > 6, told
        assert [number for number in numbers if number not in where.replace(",", "")] == []
    for row in re.findall(r"(?:prefill|decode) .*", tables["bench"]):  # speeds, ratio, ideal
        speeds = re.findall(r"(\S+) \[", row)
        ratio, ideal = re.findall(r"\d+\.\d{3}(?![-\d])", row.rpartition("]")[2])[:2]
        assert [n for n in (*speeds, ratio, ideal) if n not in text] == [], row
    alone = tmp_path / "alone.html"
    assert simdiff("report", bench, "-o", alone) == 0
    page_of_bench = Structure(alone.read_text())
    assert page_of_bench.headings == ["Speed against the ideal", "Where this comes from"]
    assert "As a draft of its own parent" in page_of_bench.text
    for cores, times in ((1.25, 3), (0.0, 0)):  # above the table, and in a tile for each phase
        write_json(bench, json.loads(bench.read_text()) | {"other_processes_cores": cores})
        assert simdiff("report", out, "--bench", bench, "-o", page, "--overwrite") == 0
        text = Structure(page.read_text()).text
        assert text.count("kept 1.2 cores busy") + text.count("on a busy machine") == times
    results = json.loads((out / "results.json").read_text())
    results["pruned"]["speed"]["other_processes_cores"] = 1.25
    write_json(out / "results.json", results)
    assert simdiff("report", out, "-o", page, "--overwrite") == 0
    assert Structure(page.read_text()).text.count("on a busy machine") == 2, "of a run's own speed"
    assert simdiff("report", out, "-o", page) == 2  # it exists
    other = ("--remove", "1", *quick, "-o", bench, "--overwrite")
    assert simdiff("bench", tiny_checkpoint, *other) == 0
    assert simdiff("report", out, "--bench", bench, "-o", page, "--overwrite") == 2
    assert "must be of the plan's cut" in capsys.readouterr().err
