"""Which GPUs a process takes where several of them share a machine."""

from __future__ import annotations

import torch

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.machine import available_memory

# Of a GPU's free memory, what weights may take; the rest is for hidden states.
_FOR_WEIGHTS = 0.9


def own_device(device: str) -> str:
    """The device of this process: of several on a machine, "cuda" is a GPU of its own for each.

    Raises:
        SimdiffError: there are more processes than GPUs.
    """
    if device == "auto":
        own_gpus()
    if device != "cuda" or ranks.local()[1] == 1:
        return device
    return f"cuda:{own_gpus()[0]}"


def own_gpus() -> range:
    """The GPUs of this process: a run of those of the machine, the same number for each.

    Raises:
        SimdiffError: there are more processes than GPUs.
    """
    (number, processes), gpus = ranks.local(), torch.cuda.device_count()
    if processes > max(1, gpus):
        raise SimdiffError(
            f"{processes} processes on a machine must have a GPU each, got {gpus}: start fewer, or "
            "name one device for all (--device cpu, or cuda:0)"
        )
    each = gpus // processes
    return range(number * each, (number + 1) * each)


def own_memory() -> dict[int | str, int] | None:
    """What transformers may fill with layers, by device; None leaves it all GPUs."""
    processes = ranks.local()[1]
    if processes == 1:
        return None
    memory: dict[int | str, int] = {
        gpu: int(_FOR_WEIGHTS * torch.cuda.mem_get_info(gpu)[0]) for gpu in own_gpus()
    }
    memory["cpu"] = (available_memory(torch.device("cpu")) or 0) // processes
    return memory
