"""Figures as files: every shape has the colour that the page gives it, in SVG and in PDF."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from simdiff.errors import SimdiffError
from simdiff.report.html import document
from simdiff.report.plot import _outline, _pictures, pdf, pictures_of
from simdiff.report.svg import Chart
from support.commands import SMALL, simdiff

SVG = "{http://www.w3.org/2000/svg}"


def page() -> str:
    chart = Chart("Loss & <depth>", "A test.", height=100)
    chart.add("rect", "bar pruned", x=1, y=2, width=3.0, height=4)
    chart.add("path", "cells", d="M0 0h5v5h-5z", fill="#123456")
    chart.path([(0, 0), (9, 9)], "line ours strong", "6 3")
    chart.add("path", "line ours marker", d="M5.0 5.0m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z")
    chart.text(4, 5, "a < b", "value")
    return document("t", [chart.render(), chart.render()])


def test_shapes_keep_their_colours_without_the_page() -> None:
    first, second = _pictures(page())
    assert (first.name, second.name) == ("loss-depth", "loss-depth-2")
    root = ElementTree.fromstring(first.svg())
    rect, cells, line, marker, text = (shape.attrib for shape in list(root)[2:])
    assert rect["fill"] == "#e07b39"
    assert cells["fill"] == "#123456"
    assert (line["fill"], line["stroke"], line["stroke-width"]) == ("none", "#e07b39", "2.6")
    assert (marker["fill"], marker["stroke-width"]) == ("#e07b39", "1")
    assert (text["fill"], text["font-size"]) == ("#1a1d21", "12.5")
    assert root.attrib["width"] == "460"
    assert b"class" not in first.svg()
    assert b"var(" not in first.svg()


def test_paths_become_outlines() -> None:
    circle = _outline("M5 5m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z").interpolated(1)
    extents = circle.get_extents()
    assert (extents.x0, extents.x1) == pytest.approx((2, 8))
    assert (extents.y0, extents.y1) == pytest.approx((2, 8), abs=0.05)
    cross = _outline("M1 1l8 8m0 -8l-8 8")
    assert cross.vertices.tolist() == [[1, 1], [9, 9], [9, 1], [1, 9]]
    assert cross.codes.tolist() == [1, 2, 1, 2]
    with pytest.raises(KeyError):
        _outline("M0 0q1 1 2 2")


def test_a_pdf_has_the_words_and_the_size() -> None:
    pytest.importorskip("matplotlib")
    content = pdf(_pictures(page())[0])
    assert content.startswith(b"%PDF")
    assert b"/MediaBox [ 0 0 345 75 ]" in content
    assert content == pdf(_pictures(page())[0])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SimdiffError, match=r"simdiff-kernels\[plot\].*--formats svg"):
        pdf(_pictures(page())[0])


def test_every_figure_of_a_comparison_and_of_a_report(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, files = tmp_path / "out", tmp_path / "files"
    words = ("compare", tiny_checkpoint, "--text", tiny_text, *SMALL, "--num-layers", "1,2")
    assert simdiff(*words, "--criteria", "simdiff,last-n", "-o", out) == 0
    capsys.readouterr()
    assert simdiff("plot", out, "-o", files) == 0
    made = sorted(path.name for path in files.iterdir())
    drawn = re.findall(r"<svg ", (out / "compare.html").read_text())
    assert len(made) == 2 * len(drawn) > 4
    assert "perplexity-over-removed-layers.pdf" in made
    assert simdiff("plot", out, "-o", files) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert simdiff("plot", out, "-o", files, "--overwrite", "--formats", "svg") == 0
    assert simdiff("plot", out, "-o", files, "--formats", "png") == 2
    assert simdiff("plot", tmp_path / "absent", "-o", files) == 2
    capsys.readouterr()
    monkeypatch.setattr("simdiff.report.plot.pictures_of", lambda path: 1 / 0)
    for place, message in (
        (tmp_path / "absent" / "files", "its parent directory must exist"),
        (out / "compare.html", "must be a folder, and is a file"),
    ):
        assert simdiff("plot", out, "-o", place) == 2, "before anything is drawn"
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    plan = out / "plans" / "simdiff-2.json"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_bytes(plan.read_bytes())
    (tmp_path / "run" / "scores.json").write_bytes((out / "scores.json").read_bytes())
    names = [picture.name for picture in pictures_of(tmp_path / "run")]
    assert "cost-of-every-block" in names
    assert all(pdf(picture) for picture in pictures_of(tmp_path / "run"))
    (tmp_path / "page.html").write_text("<p>no figure")
    with pytest.raises(SimdiffError, match="has none"):
        pictures_of(tmp_path / "page.html")
