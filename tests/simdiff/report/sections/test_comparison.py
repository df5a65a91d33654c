"""A comparison on a page: read from its files, sorted and filtered, with the terminal's numbers."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from simdiff.comparison.plans import Cell
from simdiff.comparison.results import ComparedCell, Comparison
from simdiff.errors import SimdiffError
from simdiff.evaluation.intervals import PerplexityInterval
from simdiff.planning.plan import PruningPlan
from simdiff.report.cells import cell_texts
from simdiff.report.page import report_page
from simdiff.report.terminal.tables import comparison_table
from simdiff.scoring.scores import LayerScores
from support.browser import look_at, needs_chromium
from support.pages import Structure

# By criterion and number of layers; nothing was measured where there is no number.
PERPLEXITIES = {
    ("simdiff", 1): 31.5,
    ("last-n", 1): 1_040_000.0,
    ("random", 1): 1040.4,
    ("simdiff", 2): 47.25,
    ("last-n", 2): None,
    ("random", 2): 40.125,
}


@pytest.fixture
def compared(run: tuple[Path, PruningPlan], scores: LayerScores, tmp_path: Path) -> Path:
    """The directory of a comparison of the run's model, dense 30.25."""
    cells = []
    for seconds, ((criterion, count), value) in enumerate(PERPLEXITIES.items()):
        plan = replace(run[1], removed=tuple(range(2, 2 + count)))
        if value is None:
            cells.append(ComparedCell(Cell(criterion, count, None, 0.5), None, "refused: why"))
            continue
        ratio = value / 30.25
        quality = PerplexityInterval(value, value - 1, value + 2, ratio, 0.9 * ratio, 1.2 * ratio)
        cells.append(ComparedCell(Cell(criterion, count, plan, 100.0 * seconds), quality, None))
    provenance = {
        "model": scores.model,
        "calibration": scores.calibration,
        "held_out": {"source": "x", "num_windows": 4},
        "search_windows": 2,
        "options": {"alpha": 0.5},
        "intervals": {"confidence": 0.95, "of": "windows"},
        "num_threads": 1,
        "machine": "a machine",
        "scoring_seconds": 12.5,
    }
    dense = PerplexityInterval(30.25, 29.0, 31.5, 1.0, None, None)
    directory = tmp_path / "comparison"
    directory.mkdir()
    Comparison(scores, dense, tuple(cells), provenance).save(directory)
    return directory


def test_it_is_read_back(compared: Path) -> None:
    found = Comparison.load(compared)
    written = json.loads((compared / "compare.json").read_text())
    again = found.to_dict()
    del written["created"], again["created"]
    assert again == written
    assert found.at("simdiff", 2).removed == (2, 3)
    written["cells"][0].pop("seconds_to_plan")
    (compared / "compare.json").write_text(json.dumps(written | {"created": ""}))
    with pytest.raises(SimdiffError, match="complete comparison, but is damaged: KeyError"):
        Comparison.load(compared)


def test_the_terminal_shows_the_same_numbers(compared: Path) -> None:
    page = Structure(report_page(compared))
    stream = io.StringIO()
    Console(file=stream, width=160).print(comparison_table(Comparison.load(compared)))
    shown = re.findall(r"\d[\d,.]*\d[MkG]?", stream.getvalue())
    assert {"1.04M", "1,040", "40.12"} <= {*shown}
    assert [text for text in shown if text not in page.text] == []
    for entry in Comparison.load(compared).cells:
        assert " ".join(filter(None, cell_texts(entry))) in page.text
    assert not re.search(r"\de[+-]\d", stream.getvalue() + page.text)
    for text in ("40.12*", "refused: why", "12.5 s", "8.33 min", "scores every layer"):
        assert text in page.text


def test_a_narrow_terminal_cuts_no_number(compared: Path) -> None:
    found = Comparison.load(compared)
    for width, told in ((160, True), (72, False)):
        stream = io.StringIO()
        Console(file=stream, width=width).print(comparison_table(found))
        shown = stream.getvalue()
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        assert ("to plan" in shown) is told, "what can best be spared goes first"
        assert "95%" in shown


def test_beside_a_run_and_alone(run: tuple[Path, PruningPlan], compared: Path) -> None:
    alone = Structure(report_page(compared))
    both = Structure(report_page(run[0], comparison=compared))
    heading = "Criteria compared: perplexity over removed layers"
    assert alone.headings[0] == heading
    assert both.headings.index("Quality") < both.headings.index(heading)
    assert "3 criteria compared" in alone.text
    assert "2 of 6 layers removed" in both.text
    for page in (alone, both):  # 0 of a tied embedding is no size of it
        assert "model embedding parameters" not in page.text
        for told in (": 1 layers", ", 1 layers"):
            assert not any(told in (of["aria-label"] or "") for _, of in page.pictures)
    other = json.loads((compared / "scores.json").read_text())
    other["model"]["fingerprint"] = "other"
    (compared / "scores.json").write_text(json.dumps(other))
    with pytest.raises(SimdiffError, match="must be of the plan's model"):
        report_page(run[0], comparison=compared)
    with pytest.raises(SimdiffError, match="a recovery is of a plan"):
        report_page(compared, recovery=run[0])


# Types into the filter of the second table, sorts, and tells what is then to be seen.
ACTIONS = """<script>addEventListener('load', () => {
  const table = document.querySelectorAll('table.sortable')[1];
  const heads = [...table.querySelectorAll('th button')];
  const seen = () => [...table.tBodies[0].rows].filter(row => !row.hidden)
    .map(row => row.cells[0].textContent + ' ' + row.cells[1].textContent).join(', ');
  const field = table.parentElement.previousElementSibling.querySelector('input');
  const type = text => { field.value = text; field.dispatchEvent(new Event('input')); };
  const found = [];
  heads[2].click(); found.push(seen());
  heads[2].click(); found.push(seen());
  heads[1].click(); found.push(seen());
  type('2 '); found.push(seen());
  type('dom'); found.push(seen() + ' | ' + field.parentElement.textContent);
  table.tBodies[0].rows[0].cells[0].textContent = '12';
  for (const words of ['2', '12', 'last 12']) { type(words); found.push(seen()); }
  heads[0].focus();
  found.push(document.activeElement.tagName + heads[1].parentElement.getAttribute('aria-sort'));
  console.log(JSON.stringify(found));
})</script>"""


@needs_chromium
def test_it_sorts_and_filters(compared: Path, tmp_path: Path) -> None:
    page = report_page(compared)
    assert "http" not in re.search("<script>(.*?)</script>", page, re.DOTALL)[1]  # type: ignore[index]
    found = look_at(page.replace("</body>", ACTIONS + "</body>"), 360, tmp_path)
    assert (found["wide"], found["scroll"]) == ([], 360)
    (line,) = found["console"]
    told = json.loads(re.search(r'"(\[.*\])", source', line)[1])  # type: ignore[index]
    assert told == [
        "1 simdiff, 2 random, 2 simdiff, 1 random, 1 last-n, 2 last-n",
        "1 last-n, 1 random, 2 simdiff, 2 random, 1 simdiff, 2 last-n",
        "1 last-n, 2 last-n, 1 random, 2 random, 2 simdiff, 1 simdiff",
        "2 last-n, 2 random, 2 simdiff",
        "1 random, 2 random | Filter2 of 6 rows",
        "2 last-n, 2 random, 2 simdiff",  # a number is a whole cell: not 12
        "12 last-n",
        "12 last-n",
        "BUTTONascending",
    ]
