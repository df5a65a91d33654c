"""`simdiff plot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser, names
from simdiff.errors import SimdiffError

TEXT = "The figures of a report or a comparison as SVG and PDF files."
FORMATS = ("svg", "pdf")


def add(sub: CommandParser) -> None:
    """The options of `simdiff plot`."""
    sub.add_argument(
        "source",
        type=Path,
        metavar="PATH",
        help="directory that `simdiff run`, `prune`, `recover` or `compare` wrote, or a page of "
        "`simdiff report`",
    )
    group = sub.group("output")
    group.add_argument(
        "--output", "-o", type=Path, required=True, metavar="FOLDER", help="where the files go"
    )
    group.add_argument(
        "--formats",
        type=names,
        metavar="NAMES",
        help="svg, pdf or both (default: svg, and pdf where matplotlib is installed)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")


def needs_torch(arguments: argparse.Namespace) -> bool:
    """A picture is made of files."""
    return False


def check(arguments: argparse.Namespace) -> None:
    """Refuse formats that there are not, and a place that is no folder."""
    formats, folder = arguments.formats or FORMATS, arguments.output
    if set(formats) - set(FORMATS):
        raise SimdiffError(f"--formats must be of {', '.join(FORMATS)}, got {','.join(formats)}")
    if not folder.absolute().parent.is_dir():
        raise SimdiffError(
            f"output {folder}: its parent directory must exist, {folder.parent} does not"
        )
    if folder.exists() and not folder.is_dir():
        raise SimdiffError(f"output {folder} must be a folder, and is a file")


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff plot`."""
    from importlib.util import find_spec

    from simdiff.io.kinds import Kind
    from simdiff.io.outputs import check_new_file, write_bytes
    from simdiff.report.plot import pdf, pictures_of

    usual = FORMATS if find_spec("matplotlib") else ("svg",)
    formats = arguments.formats or usual
    made: dict[Path, bytes] = {}
    for picture in pictures_of(arguments.source):
        for form in formats:
            path = arguments.output / f"{picture.name}.{form}"
            made[path] = picture.svg() if form == "svg" else pdf(picture)
    try:
        arguments.output.mkdir(exist_ok=True)
    except OSError as error:
        raise SimdiffError(f"output {arguments.output}: {error.strerror}") from None
    for path in made:
        check_new_file(path.absolute(), arguments.overwrite, Kind.FIGURE)
    for path, content in made.items():
        write_bytes(path, content)
    note = () if "pdf" in formats or arguments.formats else ("Note: no PDF without matplotlib.",)
    show(arguments, {"files": [str(path) for path in made]}, *map(str, made), *note)
