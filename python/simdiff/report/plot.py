"""The figures of a page as files of their own: SVG that needs no style sheet, and PDF."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from simdiff.errors import SimdiffError
from simdiff.io.kinds import COMPARISON_MARKER, FIGURE_MARK, PLAN_FILE
from simdiff.report.html import STYLE

if TYPE_CHECKING:
    from matplotlib.path import Path as Outline

_SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)
_FONT = "DejaVu Sans, Verdana, sans-serif"
# Points of a PDF for each unit of a picture.
_POINT = 0.75
# Numbers that a command of a path takes.
_STEPS = {"M": 2, "L": 2, "m": 2, "l": 2, "h": 1, "v": 1, "a": 7, "z": 0}


@dataclass(frozen=True)
class Picture:
    """One figure, whose shapes carry their colours themselves."""

    name: str
    """Of its file, without a suffix."""
    root: ElementTree.Element

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in units."""
        _, _, width, height = map(float, self.root.attrib["viewBox"].split())
        return width, height

    def svg(self) -> bytes:
        """The content of an SVG file."""
        self.root.set("data-generator", FIGURE_MARK)
        content: bytes = ElementTree.tostring(self.root, "utf-8", xml_declaration=True)
        return content + b"\n"

    def _repr_svg_(self) -> str:
        """What a notebook shows of it."""
        return self.svg().decode()


def pictures_of(path: Path) -> list[Picture]:
    """The figures of the page that a directory has, or that a file is.

    Args:
        path: directory of `simdiff run`, `prune`, `recover` or `compare`, or a page of `report`.

    Raises:
        SimdiffError: there is no such page, or it has no figures.
    """
    found = _pictures(_page(path))
    if not found:
        raise SimdiffError(f"plot {path}: the page must have figures, and has none")
    return found


def _page(path: Path) -> str:
    if path.is_dir() and (path / COMPARISON_MARKER).is_file():
        path = path / "compare.html"
    elif path.is_dir() and (path / PLAN_FILE).is_file():
        from simdiff.report.page import render_page
        from simdiff.report.sources import read_sources

        return render_page(read_sources(path))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise SimdiffError(
            f"plot {path}: must be a directory with {PLAN_FILE} or {COMPARISON_MARKER}, or a page "
            "of `simdiff report`"
        ) from None


def _pictures(page: str) -> list[Picture]:
    names: dict[str, int] = {}
    found = []
    for text in _SVG.findall(page):
        root = ElementTree.fromstring(text)
        name = re.sub(r"\W+", "-", root.findtext("title", "figure").lower()).strip("-")
        names[name] = names.get(name, 0) + 1
        for shape in root.iter():
            _color(shape)
        number = f"-{names[name]}" if names[name] > 1 else ""
        picture = Picture(name + number, root)
        width, height = picture.size
        root.attrib |= {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": f"{width:g}",
            "height": f"{height:g}",
            "font-family": _FONT,
        }
        found.append(picture)
    return found


@dataclass(frozen=True)
class _Rule:
    """One selector of the style sheet and what it sets."""

    tag: str
    classes: frozenset[str]
    values: dict[str, str]


@cache
def _rules() -> list[_Rule]:
    """Those for pictures in light colours, the most special ones last."""
    colors = dict(re.findall(r"--([\w-]+): (#\w+)", STYLE[: STYLE.index("@media")]))
    found = []
    screen = STYLE[STYLE.index("svg text") : STYLE.index("@media (max-width")]
    for selector, body in re.findall(r"svg ([^{}]+?) \{([^{}]*)\}", screen):
        values = dict(re.findall(r"([\w-]+): ([^;]+);", body))
        values = {
            key: re.sub(r"var\(--([\w-]+)\)", lambda name: colors[name[1]], value)
            for key, value in values.items()
            if key != "font-variant-numeric"
        }
        first, _, choice = selector.partition(":is(")
        for more in choice.rstrip(")").split(", "):
            words = f"{first}{more}".split(".")
            found.append(_Rule(words[0], frozenset(words[1:]), values))
    return sorted(found, key=lambda rule: len(rule.classes))


def _color(shape: ElementTree.Element) -> None:
    """Put on a shape what the style sheet says of its classes."""
    classes = set(shape.attrib.pop("class", "").split())
    for rule in _rules():
        if rule.tag in ("", shape.tag) and rule.classes <= classes:
            shape.attrib |= {k: v.removesuffix("px") for k, v in rule.values.items()}


def pdf(picture: Picture) -> bytes:
    """The content of a PDF file, drawn by matplotlib.

    Raises:
        SimdiffError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SimdiffError(
            "PDF is drawn by matplotlib, which is not installed: "
            'pip install "simdiff-kernels[plot]", or take SVG alone (--formats svg)'
        ) from None
    width, height = picture.size
    with matplotlib.rc_context({"pdf.fonttype": 42, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width * _POINT / 72, height * _POINT / 72))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.axis("off")
        for shape in picture.root:
            _draw(axes, shape.tag.rpartition("}")[2], shape)
        content = io.BytesIO()
        details = {
            "Title": picture.root.findtext("title"),
            "Creator": FIGURE_MARK,
            "CreationDate": None,
        }
        figure.savefig(content, format="pdf", metadata=details)
    return content.getvalue()


def _draw(axes: Any, kind: str, shape: ElementTree.Element) -> None:
    from matplotlib import patches
    from matplotlib.path import Path as Outline

    def at(*names: str) -> list[float]:
        return [float(shape.attrib[name]) for name in names]

    get = shape.attrib.get
    if kind == "text":
        x, y = at("x", "y")
        side = {"middle": "center", "end": "right"}.get(get("text-anchor", ""), "left")
        size = float(get("font-size", "12")) * _POINT
        axes.text(x, y, shape.text, ha=side, va="baseline", size=size, color=get("fill"))
        return
    patch: Any
    dashes = get("stroke-dasharray")
    line = "none" if get("stroke", "none") == "none" else get("stroke")
    style: dict[str, Any] = {
        "facecolor": get("fill", "black"),
        "edgecolor": line,
        "linewidth": float(get("stroke-width", "1")) * _POINT if line != "none" else 0,
        "alpha": float(get("opacity", "1")),
        "linestyle": (0, [float(d) / float(get("stroke-width", "1")) for d in dashes.split()])
        if dashes
        else "solid",
    }
    if kind == "line":
        x1, y1, x2, y2 = at("x1", "y1", "x2", "y2")
        patch = patches.PathPatch(Outline([(x1, y1), (x2, y2)]), **style)
    elif kind == "rect":
        x, y, width, height = at("x", "y", "width", "height")
        patch = patches.Rectangle((x, y), width, height, **style)
    elif kind == "circle":
        x, y, radius = at("cx", "cy", "r")
        patch = patches.Circle((x, y), radius, **style)
    elif kind == "path":
        patch = patches.PathPatch(_outline(shape.attrib["d"]), **style)
    else:  # title and description
        return
    axes.add_patch(patch)


def _steps(text: str) -> Iterator[tuple[str, list[float]]]:
    for command, rest in re.findall(r"([a-zA-Z])([^a-zA-Z]*)", text):
        numbers = [float(n) for n in re.findall(r"-?\d*\.?\d+", rest)]
        assert len(numbers) == _STEPS[command], text
        yield command, numbers


def _outline(text: str) -> Outline:
    """A path of the commands that charts use; an arc is half of a circle."""
    from matplotlib.path import Path as Outline

    points: list[tuple[float, float]] = []
    codes: list[int] = []
    x = y = first_x = first_y = 0.0
    for command, numbers in _steps(text):
        if command == "z":
            points.append((first_x, first_y))
            codes.append(int(Outline.CLOSEPOLY))
            x, y = first_x, first_y
            continue
        before = x, y
        if command in "ML":
            x, y = numbers
        elif command in "hv":
            x, y = (x + numbers[0], y) if command == "h" else (x, y + numbers[0])
        else:  # m, l, a
            x, y = x + numbers[-2], y + numbers[-1]
        if command == "a":
            across = (y - before[1]) * 2 / 3, (before[0] - x) * 2 / 3
            points += [(px + across[0], py + across[1]) for px, py in (before, (x, y))]
            codes += [int(Outline.CURVE4)] * 2
            assert math.isclose(math.dist(before, (x, y)), 2 * numbers[0], rel_tol=1e-3)
        if command in "Mm":
            first_x, first_y = x, y
        points.append((x, y))
        kind = Outline.MOVETO if command in "Mm" else Outline.LINETO
        codes.append(int(Outline.CURVE4 if command == "a" else kind))
    return Outline(points, codes)
