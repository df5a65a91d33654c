"""One wheel beside every torch and Python: `make install-matrix`.

The wheel is built once (tools/manylinux/build.py). Of each pair of a Python (`python3.X` on the
path) and a torch, an environment is made under build/install-matrix, the wheel is installed, and
tools/install_check.py is run there. docs/install-matrix.json keeps what came out, docs/install.md
shows it as a table.
`--cells 3.10:2.10.0 3.13:2.15.0` runs some pairs alone and keeps the others of the same wheel;
`--wheel FILE` takes a wheel that was built before. A torch is some 5 GB with its CUDA libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from manylinux.build import build

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "install-matrix"
RESULT = ROOT / "docs" / "install-matrix.json"
PAGE = ROOT / "docs" / "install.md"
MARKS = "<!-- install matrix -->\n", "<!-- end of the install matrix -->\n"

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The last release of each line that the package supports.
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
# Of these the registry has no wheel.
WITHOUT_WHEEL = {("3.10", "2.15.0")}


def all_cells() -> list[tuple[str, str]]:
    """Every pair of a Python and a torch that the registry has."""
    pairs = [(python, torch) for torch in TORCHES for python in PYTHONS]
    return [pair for pair in pairs if pair not in WITHOUT_WHEEL]


def uv(*arguments: str) -> None:
    """Run uv, which shares the files of packages among environments."""
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        raise SystemExit("install_matrix needs uv: pip install uv")
    # On the file system of the environments, so that files are linked and not copied.
    environment = os.environ | {"UV_CACHE_DIR": str(CACHE / "uv"), "UV_SYSTEM_CERTS": "1"}
    subprocess.run([found, *arguments], check=True, env=environment)


def check(python: str, torch: str, wheel: Path) -> dict[str, Any]:
    """Make the environment of a pair, install the wheel and run the checks there."""
    folder = CACHE / f"py{python}-torch{torch}"
    inside = folder / "bin" / "python"
    if not inside.exists():
        uv("venv", "--quiet", "--python", f"python{python}", str(folder))
    install = ["pip", "install", "--quiet", "--python", str(inside)]
    uv(*install, f"torch=={torch}", "numpy", "setuptools")
    uv(*install, "--no-deps", "--reinstall", str(wheel))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(inside), str(ROOT / "tools" / "install_check.py")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        return {"python": python, "torch": torch, "problems": {"run": result.stderr[-1000:]}}
    return json.loads(result.stdout.splitlines()[-1])


def describe(wheel: Path) -> dict[str, Any]:
    """What tells one wheel from another."""
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"name": wheel.name, "bytes": len(content), "sha256": digest}


def short(version: str) -> str:
    """3.10.13 as 3.10; a torch without its local part."""
    return version.split("+")[0]


def table(result: dict[str, Any]) -> str:
    """The block of docs/install.md that shows a result."""
    cells = {
        (".".join(cell["python"].split(".")[:2]), short(cell["torch"])): cell
        for cell in result["cells"]
    }

    def shown(python: str, torch: str) -> str:
        if (python, torch) in WITHOUT_WHEEL:
            return "no torch"
        if (python, torch) not in cells:
            return "not run"
        problems = cells[python, torch]["problems"]
        return f"failed: {', '.join(problems)}" if problems else "passed"

    wheel = result["wheel"]
    lines = [
        f"One wheel, `{wheel['name']}` ({wheel['bytes'] / 1e6:.1f} MB), on {result['date']}, "
        f"{result['machine']}, without a GPU:",
        "",
        "| torch | Triton |" + "".join(f" Python {python} |" for python in PYTHONS),
        "|---|---|" + "---|" * len(PYTHONS),
    ]
    for torch in TORCHES:
        tritons = sorted(
            {c["triton"] for (_, t), c in cells.items() if t == torch and "triton" in c}
        )
        row = [torch, ", ".join(tritons) or "", *(shown(python, torch) for python in PYTHONS)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page with the table of this result between its marks."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}{table(result)}{MARKS[1]}{after}"


def keep(result: dict[str, Any]) -> None:
    """Write the result and the table that shows it."""
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--wheel", type=Path)
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    wheel = arguments.wheel or build()
    what, cells = describe(wheel), {}
    if arguments.cells and RESULT.exists():
        earlier = json.loads(RESULT.read_text())
        if earlier["wheel"] == what:
            cells = {(c["python"][:4], short(c["torch"])): c for c in earlier["cells"]}
    pairs = [tuple(cell.split(":")) for cell in arguments.cells or ()] or all_cells()
    for python, torch in pairs:
        cell = check(python, torch, wheel)
        print(
            f"Python {python}, torch {torch}: {', '.join(cell['problems']) or 'passed'}", flush=True
        )
        cells[python, torch] = cell
        machine = f"{platform.system()} {platform.machine()}"
        result = {"wheel": what, "date": str(date.today()), "machine": machine}
        keep(result | {"cells": [cells[key] for key in sorted(cells)]})
    if any(cell["problems"] for cell in cells.values()):
        raise SystemExit("some pairs failed: docs/install-matrix.json tells what")


if __name__ == "__main__":
    main()
