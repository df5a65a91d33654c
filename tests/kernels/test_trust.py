"""The constants of the test for short sums: one header and its mirror in Python, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from simdiff_kernels import reference, trust

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "common" / "trust.h"
NAMES = {
    "kSmallestShort": "SMALLEST_SHORT",
    "kLargestShort": "LARGEST_SHORT",
    "kShortestAfter": "SHORTEST_AFTER",
    "kMostMagnified": "MOST_MAGNIFIED",
    "kMostCancelled": "MOST_CANCELLED",
}


def constants() -> dict[str, float]:
    """Every constant of the header by its name there."""
    found: dict[str, float] = {}
    for name, text in re.findall(r"constexpr double (k\w+) = ([^;]+);", HEADER.read_text()):
        found[name] = eval(text, {}, dict(found))
    return found


def test_python_has_the_constants_of_the_header() -> None:
    assert len(constants()) == 11
    for name, mirror in NAMES.items():
        assert getattr(trust, mirror) == constants()[name], name
    public = {name for name in vars(trust) if name.isupper()}
    assert public == set(NAMES.values())


def test_no_other_file_has_a_constant_of_its_own() -> None:
    """1e-24, 1e30, 15/16: a literal elsewhere would not follow the header."""
    folders = [ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda", ROOT / "csrc" / "common"]
    files = [path for folder in folders for path in folder.iterdir() if path != HEADER]
    files += [ROOT / "simdiff_kernels" / "reference.py"]
    files += (ROOT / "simdiff_kernels" / "triton").iterdir()
    assert len(files) > 40
    for path in filter(Path.is_file, files):
        assert not re.search(r"\b1e-24|\b1e\+?30\b|\b0\.9375", code_of(path)), path


def code_of(path: Path) -> str:
    return re.sub(r"(//|#).*", "", path.read_text())


def test_what_the_reference_asks() -> None:
    """On both sides of each limit, from sums alone: x, y, d and the absolute difference."""

    def enough(x: float, y: float, d: float, absolute: float = 1.0) -> bool:
        sums = torch.tensor([x, y, d, absolute], dtype=torch.float64)
        return bool(reference.float32_is_enough(sums))

    assert enough(1, 1, 0.5)
    assert enough(1, 1, 0, 0)
    assert not enough(1, 1, 0, 1e-30)  # differences whose squares underflow
    assert enough(1, 0.063, 0.9)
    assert not enough(1, 0.062, 0.9)  # y too short
    assert enough(2e-24, 2e-24, 1.1e-24)
    assert not enough(2e-24, 2e-24, 0.9e-24)
    assert not enough(0.9e-24, 2e-24, 2e-24)
    assert enough(0.9e30, 0.9e30, 0.9e30)
    for sums in ((1.1e30, 1, 1), (1, 1.1e30, 1), (1, 1, 1.1e30)):
        assert not enough(*sums)
    # (y - x)^2 / (x + y) = 0.2^2 / 2 = 0.02, of d 15/16 at most
    assert enough(0.9, 1.1, 0.02 / 0.93)
    assert not enough(0.9, 1.1, 0.02 / 0.94)
    assert not enough(float("nan"), 1, 1)
    assert not enough(float("inf"), 1, 1)
