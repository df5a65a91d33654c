"""Launches a Triton kernel with as little work on the host as Triton's own launcher allows.

No bytes of the states are touched here; an update of a small batch is limited by this.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

WARP_SIZE = 64 if torch.version.hip else 32

_compiled: dict[tuple[Hashable, ...], Any] = {}


def launch_options(num_threads: int, warp_size: int = WARP_SIZE) -> dict[str, int | bool]:
    """Triton's options; fused multiply-add is the default only up to Triton 3.9."""
    return {"num_warps": num_threads // warp_size, "enable_fp_fusion": True}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Hashable, ...],
    types: tuple[Hashable, ...],
    num_threads: int,
) -> None:
    """Launch on the current stream of the device of the first argument, a tensor.

    Triton looks at each argument of each call to find the kernel that was compiled for arguments
    like these, 20 us for a dozen of them. Here `constants` and `types` must tell all that the
    kernel depends on, and it must have `do_not_specialize` for every other argument; what Triton
    compiled for them is then launched directly, as its tutorial on fused softmax does.
    """
    if not arguments[0].is_cuda:  # interpreted
        kernel[grid](*arguments, *constants)
        return
    device = arguments[0].device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, constants, types, num_threads)
        return
    key = (kernel.__name__, device, constants, types)
    compiled = _compiled.get(key)
    if compiled is None:
        options = launch_options(num_threads)
        _compiled[key] = kernel[grid](*arguments, *constants, **options)  # compiles and launches
    else:
        compiled[grid](*arguments, *constants)
