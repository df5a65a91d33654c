"""Relative error of the cosine distance, ours and as peers compute it, against an exact result.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy.csv

States of hidden size 4096 with one massive channel (300 times the rest), at set distances. Peers
compute `1 - torch.cosine_similarity(x, y)` in the states' dtype, or in a wider one. Ours runs with
every instruction set of this processor. One row of the CSV for each dtype, distance and way: the
worst of 256 tokens, of which those that became equal by rounding have nothing to measure.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import provenance
import torch
from torch import Tensor

from simdiff_kernels import _C, token_metrics
from simdiff_kernels.testing import exact_metrics, near

DISTANCES = tuple(f"1e-{exponent}" for exponent in range(8))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Way = Callable[[Tensor, Tensor], Tensor]


def ours(name: str, before: Tensor, after: Tensor) -> Tensor:
    """On the CPU, with one of its instruction sets."""
    chosen = _C.selected_instruction_set()
    _C.select_instruction_set(name)
    try:
        return token_metrics(before, after, backend="cpu").cosine_distance
    finally:
        _C.select_instruction_set(chosen)


def ways() -> dict[str, Way]:
    """By name, those of this processor."""

    def peers(widen: Callable[[Tensor], Tensor]) -> Way:
        return lambda x, y: 1 - torch.cosine_similarity(widen(x), widen(y), dim=-1)

    return {
        "1 - cosine_similarity": peers(lambda x: x),
        "1 - cosine_similarity, float32": peers(Tensor.float),
        "1 - cosine_similarity, float64": peers(Tensor.double),
        **{
            f"ours, {name}": functools.partial(ours, name)
            for name in _C.available_instruction_sets()
        },
    }


def errors(names: dict[str, Way]) -> Iterator[dict[str, str]]:
    """Of every dtype and distance, rows as they stand in the CSV."""
    for kind, dtype in DTYPES.items():
        for distance in DISTANCES:
            build = near((256, 4096), float(distance), massive=True, dtype=dtype)
            before, after = build(torch.Generator().manual_seed(int(distance[3:])))
            exact = exact_metrics(before, after).cosine_distance
            told = exact > 0
            for name, way in names.items():
                error = (way(before, after).double() - exact).abs()[told] / exact[told]
                yield {
                    "dtype": kind,
                    "distance": distance,
                    "way": name,
                    "worst error": f"{error.max().item():.3g}",
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    rows = []
    options = parser.parse_args()
    for row in errors(ways()):
        print("  ".join(row.values()), flush=True)
        rows.append(row)
    with open(options.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    provenance.keep([options.output], ["cpu scorers"])


if __name__ == "__main__":
    main()
