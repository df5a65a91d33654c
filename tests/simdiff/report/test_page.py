"""The page of a run: its content, its form, and what Chromium makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simdiff.io.json_files import write_json
from simdiff.planning.confidence import PlanConfidence
from simdiff.planning.plan import PruningPlan
from simdiff.report.numbers import plain
from simdiff.report.page import render_page
from simdiff.report.sources import read_sources
from simdiff.scoring.scores import LayerScores
from support.browser import look_at, needs_chromium
from support.pages import Structure
from support.report_files import NAME, evaluation, recovery


@pytest.fixture
def everything(run: tuple[Path, PruningPlan]) -> str:
    directory, plan = run
    write_json(directory / "evaluation.json", evaluation(plan))
    write_json(directory / "recovery.json", recovery())
    return render_page(read_sources(directory))


def test_numbers_are_those_of_the_files(
    everything: str, run: tuple[Path, PruningPlan], scores: LayerScores
) -> None:
    page, plan = Structure(everything), run[1]
    assert page.headings == [
        "What was cut, and why",
        "Metrics over depth",
        "Every block of layers",
        "Every layer and its reason",
        "Quality",
        "Speed against the ideal",
        "Recovery",
        "What the pruned model writes",
        "Where this comes from",
    ]
    for layer in range(6):
        assert plan.reason(layer) in page.text
        assert plain(scores.metrics["squared_difference"].maximum[layer]) in page.text
        assert f"{plan.importance[layer]:.6g}" in page.text
    for text in (
        f"{NAME}: 2 of 6 layers removed",
        "30.25 → 44.75",
        "44.75 → 36.50",
        "1.48 times",  # the headline
        "40.72 to 50.12",  # 0.91 and 1.12 times 44.75
        "63.5 ± 1.5 (-6.6 ± 1.0)",
        "90.5 ± 2.3",
        "rte, acc_norm, % (chance 50.0, dense at chance)",
        "44.00 to 47.00",
        "1.492 (1.111 to 1.999)",
        "classification, average without tasks at chance (1), %",
        "trivia, acc_norm, % (written)",
        "generation, average of all tasks (1), %",
        "60.7 ± 2.3",  # 0.9049 to the fifth
        "1.432",
        "95.1%",
        "1.346",
        "96.3%",
        "812",
        "68.1",  # speed
        "the others were repaired",
        "52% of the way",
        "4.4700",
        "30,000",
        "Ended because all steps were done",
        "4.5678",
        "layer 3 0.432",
        "stopped early",  # recovery
        "attn.q, attn.k",
        "0.877",
        "Once <i> upon & a time",
        str(plan.model["fingerprint"]),
        "a <text>",
        "--num-layers 2 --protect 0",
    ):
        assert text in page.text, text
    start = min(plan.removed)
    block = scores.blocks
    assert block is not None
    cost = sum(block.metrics[n][start][start + 1] for n in ("cosine_distance", "norm_change"))
    assert f"{cost:.3g}" in page.text


def test_it_stands_alone_and_can_be_read_aloud(everything: str) -> None:
    page = Structure(everything)
    assert page.urls == ["data:,"]
    assert not re.search("<script|@import|url\\(|https?:", everything)
    assert len(everything.encode()) < 1_000_000
    assert "<b>&quot;" not in everything
    assert len(page.pictures) == 11
    for _, values in page.pictures:
        assert values["role"] == "img"
        assert len(values["aria-label"] or "") > 40
    assert re.search("layer 3 0.432", everything)


def test_what_is_not_there_leaves_nothing_behind(run: tuple[Path, PruningPlan]) -> None:
    directory, _ = run
    alone = Structure(render_page(read_sources(directory)))
    assert "Recovery" not in alone.headings
    (directory / "results.json").unlink()
    (directory / "scores.json").unlink()
    page = render_page(read_sources(directory))
    assert Structure(page).headings == [
        "What was cut, and why",
        "Every layer and its reason",
        "Where this comes from",
    ]
    assert not re.search(r"<(div|p|table|tbody|ul|figure|td)[^>]*></\1>", page)


def test_kinds_of_layers_in_the_strip(run: tuple[Path, PruningPlan]) -> None:
    directory, plan = run
    page = render_page(read_sources(directory))
    kinds = re.findall('<li class="(\\w+)" title="layer (\\d+):', page)
    assert [int(layer) for _, layer in kinds] == list(range(6))
    assert {int(layer) for kind, layer in kinds if kind == "removed"} == set(plan.removed)
    assert kinds[0][0] == "protected"


def test_every_row_has_a_cell_for_each_heading(run: tuple[Path, PruningPlan]) -> None:
    directory, plan = run
    shares = (0.5,) * plan.num_layers
    chosen = PlanConfidence(plan.removed, shares, 0.5, shares, shares, 10, 0, 5, 5, 0)
    other = replace(chosen, removed=plan.kept[: len(plan.removed)])
    for confidence, drawn in ((chosen, True), (other, False)):
        drawn_plan = replace(plan, confidence=confidence)
        page = render_page(replace(read_sources(directory), plan=drawn_plan))
        assert ("<th scope='col'>in draws</th>" in page) == drawn
        for table in re.findall("<table.*?</table>", page, re.DOTALL):
            rows = [row.count("<t") - 1 for row in re.findall("<tr.*?</tr>", table, re.DOTALL)]
            assert len({*rows}) == 1, table


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model.norm.weight": "digest"}, "the others were repaired, which"),
        ({}, "the others are as they were, since no repair of them helped, which"),
    ],
)
def test_layers_are_said_to_be_repaired_where_they_are(
    run: tuple[Path, PruningPlan], changed: dict[str, str], told: str
) -> None:
    directory, _ = run
    write_json(directory / "recovery.json", recovery() | {"changed": changed})
    assert told in Structure(render_page(read_sources(directory))).text


def test_one_layer_of_a_small_model(run: tuple[Path, PruningPlan]) -> None:
    directory, plan = run
    plan = replace(plan, removed=plan.removed[:1])
    sources = read_sources(directory)
    results: Any = sources.results
    text = Structure(render_page(replace(sources, plan=plan))).text
    assert f"Decoder layer {plan.removed[0]} (counted from 0) of" in text
    assert "95% interval of the pruned 40.72 to 50.12" in text
    before = plan.model["num_parameters"]
    assert before < 1e6
    assert f"parameters {before / 1e3:.1f} → " in text
    assert f"{results['dense']['num_parameters'] / 1e3:.1f} k" in text


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(everything: str, width: int, dark: bool, tmp_path: Path) -> None:
    long = everything.replace("a machine", "a_machine_" * 30)
    found = look_at(long, width, tmp_path, dark=dark)
    assert found["console"] == []
    assert found["wide"] == []
    assert found["scroll"] == found["client"] == width
    assert found["small"] == 0
    lightness = sum(map(int, re.findall("\\d+", found["paper"])))
    assert lightness < 150 if dark else lightness > 600


@needs_chromium
def test_the_browser_would_notice(tmp_path: Path) -> None:
    page = "<!doctype html><main><p style='width:900px'>x</p><script>nothing()</script></main>"
    found = look_at(page, 360, tmp_path)
    assert "nothing is not defined" in "".join(found["console"])
    assert found["wide"]
    assert found["scroll"] > 360
