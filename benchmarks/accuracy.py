"""Relative error of the cosine distance, ours and as peers compute it, against an exact result.

States of hidden size 4096 with one massive channel (300 times the rest), at set distances. Prints
the Markdown table of the README. Peers: `1 - torch.cosine_similarity(x, y)` in the states' dtype.
"""

from __future__ import annotations

import torch

from simdiff_kernels import default_backend, token_metrics
from simdiff_kernels.testing import exact_metrics, near


def worst(got: torch.Tensor, exact: torch.Tensor) -> str:
    error = ((got.double() - exact).abs() / exact).max().item()
    return f"{error:.0e}"


def main() -> None:
    print("| distance | float32, 1 − cosine_similarity | bfloat16, same | float32, ours |"
          " bfloat16, ours |\n|---|---|---|---|---|")  # fmt: skip
    for exponent in range(0, 8):
        cells = []
        for naive in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                build = near((256, 4096), 10.0**-exponent, massive=True, dtype=dtype)
                before, after = build(torch.Generator().manual_seed(exponent))
                exact = exact_metrics(before, after).cosine_distance
                if naive:
                    got = 1 - torch.cosine_similarity(before, after, dim=-1)
                else:
                    got = token_metrics(before, after).cosine_distance
                # bfloat16 rounds near-identical states to identical ones: nothing to measure.
                told = exact > 0
                cells.append(worst(got[told], exact[told]) if told.any() else "—")
        print(f"| 1e-{exponent} | {' | '.join(cells)} |")
    print(f"\nbackend {default_backend('cpu')}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
