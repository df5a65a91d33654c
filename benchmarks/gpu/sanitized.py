"""All operators on small odd shapes, for compute-sanitizer to watch; programs.py runs it."""

from __future__ import annotations

import torch
from torch import Tensor

import simdiff_kernels
from simdiff_kernels import RunningBlockScores, RunningScores, backend_status, token_metrics
from simdiff_kernels.ops import has_implementation

# The last has more tokens than a GPU runs warps at once.
SHAPES = (
    (1, 1, 1),
    (2, 3, 7),
    (1, 65, 40),
    (3, 33, 72),
    (1, 130, 577),
    (2, 5, 4104),
    (1, 9001, 24),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def states_of(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> list[Tensor]:
    """Six of them; rows begin after `offset` entries of longer ones, the last is not finite."""
    wide = torch.randn(6, *shape[:-1], shape[-1] + 2 * offset).to(dtype).cuda()
    wide[-1, 0, -1, offset] = torch.inf
    return list(wide[..., offset : offset + shape[-1]])


def run(backend: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
    """Every operator that the backend has, twice into the same state."""
    states = states_of(shape, dtype, offset)
    mask = torch.rand(shape[:-1]).cuda() > 0.3
    token_metrics(states[0], states[1], backend=backend)
    layers = RunningScores(1, keep_tokens=True, backend=backend)
    blocks = RunningBlockScores(len(states) - 1, backend=backend)
    for part in (None, mask):
        simdiff_kernels.row_sums(states[0], states[1], part, backend=backend)
        layers.update(0, states[-2], states[-1], part)
        if has_implementation("accumulate_blocks", backend, torch.device("cuda")):
            blocks.update(states, part)
    layers.state_dict(), blocks.state_dict()


if __name__ == "__main__":
    torch.manual_seed(0)
    available = {status.name for status in backend_status() if status.available}
    if "cuda" in available:
        for shape in SHAPES:
            for dtype in DTYPES:
                for offset in (0, 1):
                    run("cuda", shape, dtype, offset)
    if "triton" in available:  # each shape and dtype is compiled
        for dtype in DTYPES[:2]:
            run("triton", SHAPES[4], dtype, 1)
    torch.cuda.synchronize()
    print("every operator has run")
