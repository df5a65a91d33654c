"""The page of a run: its content, its form, and what Chromium makes of it."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import look_at, needs_chromium
from report_files import NAME, evaluation, recovery, write_run
from rich.console import Console

from simdiff import cli
from simdiff.errors import SimdiffError
from simdiff.files import write_json
from simdiff.report.page import render_page
from simdiff.report.sources import read_sources
from simdiff.report.svg import Scale, scale_for
from simdiff.scores import LayerScores, score
from simdiff.selection import PruningPlan
from simdiff.tables import layers_table

VOID = {"meta", "link", "img", "br", "circle", "line", "rect", "path"}


class Structure(html.parser.HTMLParser):
    """Checks that elements are nested, and collects text, references and alternatives."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.urls: list[str] = []
        self.pictures: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.urls += [values[k] or "" for k in ("src", "href", "xlink:href") if k in values]
        if tag in ("svg", "img"):
            self.pictures.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def scores(llama: Any, token_batches: Any) -> LayerScores:
    calibration = {"source": "a <text>", "num_windows": 5, "window_length": 11, "seed": 0}
    return score(llama, token_batches, name=NAME, calibration=calibration, progress=False)


@pytest.fixture
def run(tmp_path: Path, scores: LayerScores) -> tuple[Path, PruningPlan]:
    return tmp_path / "out", write_run(tmp_path / "out", scores)


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
        "What was cut, and why", "Metrics over depth", "Every block of layers",
        "Every layer and its reason", "Quality", "Speed against the ideal", "Recovery",
        "What the pruned model writes", "Where this comes from",
    ]  # fmt: skip
    for layer in range(6):
        assert plan.reason(layer) in page.text
        assert f"{scores.metrics['squared_difference'].maximum[layer]:.4g}" in page.text
        assert f"{plan.importance[layer]:.6g}" in page.text
    for text in (
        f"{NAME}: 2 of 6 layers removed",
        "30.25 → 44.75", "44.75 → 36.50", "1.48 times",  # the headline
        "40.57 to 49.36",  # 44.75 exp(± 1.96 · 0.05)
        "63.5 ± 1.5 (-6.6 ± 1.0)", "90.5 ± 2.3", "rte, acc_norm, % (chance 50.0, dense at chance)",
        "44.00 to 47.00", "1.492 (1.111 to 1.999)", "average without tasks at chance (1), %",
        "1.432", "95.1%", "1.346", "96.3%", "811.5", "68.1",  # speed
        "52% of the way", "4.4700", "30,000", "Ended because all steps were done", "4.5678",
        "layer 3 0.432", "stopped early",  # recovery
        "Once <i> upon & a time", str(plan.model["fingerprint"]), "a <text>",
        "--num-layers 2 --protect 0",
    ):  # fmt: skip
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
        "What was cut, and why", "Every layer and its reason", "Where this comes from",
    ]  # fmt: skip
    assert not re.search(r"<(div|p|table|tbody|ul|figure|td)[^>]*></\1>", page)


def test_kinds_of_layers_in_the_strip(run: tuple[Path, PruningPlan]) -> None:
    directory, plan = run
    page = render_page(read_sources(directory))
    kinds = re.findall('<li class="(\\w+)" title="layer (\\d+):', page)
    assert [int(layer) for _, layer in kinds] == list(range(6))
    assert {int(layer) for kind, layer in kinds if kind == "removed"} == set(plan.removed)
    assert kinds[0][0] == "protected"


def _spoil(content: dict[str, Any], way: list[str], value: Any) -> None:
    *outer, last = way
    for key in outer:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("kind", "way", "value", "message"),
    [
        ("evaluation", ["schema"], "simdiff.plan", "must be a simdiff.evaluation file, got schema"),
        ("evaluation", ["schema_version"], 9, "a newer simdiff wrote it"),
        ("evaluation", ["models"], None, "but is damaged: KeyError: 'models'"),
        ("evaluation", ["models", "out/model", "perplexity"], "many", "but is damaged: TypeError"),
        (
            "evaluation",
            ["models", "out/model", "num_parameters"],
            12,
            "must hold the plan's model without",
        ),
        ("evaluation", ["models", NAME, "num_parameters"], 12, "must be of the plan's model, tiny"),
        ("recovery", ["quality", "recovered"], None, "but is damaged: KeyError: 'recovered'"),
        ("recovery", ["quality", "pruned", "nll"], 10**400, "but is damaged: OverflowError"),
        ("recovery", ["model"], {"fingerprint": "other"}, "with fingerprint .* got other"),
        ("results", ["dense", "num_parameters"], 12, "with num_parameters .* got 12"),
        ("results", ["pruned", "speed"], {}, "but is damaged: KeyError: 'prefill'"),
        ("scores", ["model", "fingerprint"], "other", "with fingerprint .* got other"),
    ],
)
def test_damaged_and_foreign_files(
    run: tuple[Path, PruningPlan], kind: str, way: list[str], value: Any, message: str
) -> None:
    directory, plan = run
    file = directory / f"{kind}.json"
    made = {"evaluation": lambda: evaluation(plan), "recovery": recovery}
    content = made[kind]() if kind in made else json.loads(file.read_text())
    _spoil(content, way, value)
    file.write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match=message):
        read_sources(directory)


def test_a_recovery_of_another_cut(run: tuple[Path, PruningPlan], tmp_path: Path) -> None:
    directory, plan = run
    other = tmp_path / "recovered"
    other.mkdir()
    write_json(other / "recovery.json", recovery())
    assert read_sources(directory, recovery=other).recovery is not None
    content = plan.to_dict()
    kept = next(layer for layer in range(1, 6) if layer not in plan.removed)
    content["removed"] = [plan.removed[0], kept]
    write_json(other / "plan.json", content)
    with pytest.raises(SimdiffError, match="must be a recovery of the plan's cut"):
        read_sources(directory, recovery=other / "recovery.json")
    with pytest.raises(SimdiffError, match="must be a directory with plan.json"):
        read_sources(tmp_path / "none")


def test_the_command_joins_a_benchmark(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    out, page, bench = tmp_path / "out", tmp_path / "page.html", tmp_path / "b.json"
    small = ("--windows", "4", "--window-length", "16")

    def simdiff(*arguments: object) -> int:
        return cli.main([str(argument) for argument in arguments])

    assert simdiff("run", tiny_checkpoint, "--text", tiny_text, *small, "--ratio", 0.4,
                   "-o", out) == 0  # fmt: skip
    quick = ("--prompt-lengths", 8, "--new-tokens", 4, "--repeats", 2, "--warm-up", 0)
    plan = ("--plan", out / "plan.json")
    assert simdiff("bench", tiny_checkpoint, *plan, *quick, "-o", bench) == 0
    capsys.readouterr()
    assert simdiff("report", out, "--bench", bench, "-o", page) == 0
    assert "from plan, scores, results, bench" in " ".join(capsys.readouterr().out.split())
    measured = json.loads(bench.read_text())["settings"][0]
    text = Structure(page.read_text()).text
    assert 'AutoTokenizer.from_pretrained("model")' in text
    for phase in ("prefill", "decode"):
        found = measured["phases"][phase]
        assert f"{found['ideal']:.3f} {100 * found['share_of_ideal']:.1f}%" in text
        assert f"{measured['pruned']['tokens_per_second'][phase]['median']:.4g}" in text
    assert simdiff("report", out, "-o", page) == 2  # it exists
    other = ("--remove", "1", *quick, "-o", bench, "--overwrite")
    assert simdiff("bench", tiny_checkpoint, *other) == 0
    assert simdiff("report", out, "--bench", bench, "-o", page, "--overwrite") == 2
    assert "must be of the plan's cut" in capsys.readouterr().err


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


def test_scales() -> None:
    scale = scale_for([1.0, 1000.0], 0, 100)
    assert scale.logarithmic
    assert scale(1000.0) - scale(100.0) == pytest.approx(scale(10.0) - scale(1.0))
    assert scale.ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert not scale_for([-1.0, 1000.0], 0, 100).logarithmic
    assert Scale(0, 10, 200, 100)(2.5) == 175
    assert Scale(0, 1, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    constant = scale_for([3.0, 3.0], 0, 100)
    assert constant(3.0) == pytest.approx(50)


@pytest.mark.parametrize("width", [80, 130])
def test_the_layers_fit_a_terminal(run: tuple[Path, PruningPlan], width: int) -> None:
    scores = LayerScores.load(run[0] / "scores.json")
    stream = io.StringIO()
    Console(file=stream, width=width).print(layers_table(scores, run[1]))
    printed = stream.getvalue()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in printed
    assert "\x1b" not in printed
    for layer in range(6):
        squared = f"{scores.metrics['squared_difference'].mean[layer]:.4g}"
        assert any(squared in line and run[1].reason(layer) in line for line in lines)
    assert ("MASD" in printed) == (width > 100)
