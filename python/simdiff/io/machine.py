"""Describe this machine in words for result files, and tell how much memory it has left."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def describe_machine() -> str:
    """One line that names the processor, the number of usable cores and the GPUs of torch."""
    import torch

    parts = [describe_processor()]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(parts)


def describe_processor() -> str:
    """Processor and number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def gpu_names() -> list[str]:
    """The NVIDIA GPUs that the driver tells of, without loading torch; empty without a driver."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    return names


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, or None where it cannot be told."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    known = [free for free in (_in_machine(), _in_group()) if free is not None]
    return min(known, default=None)


def _in_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None


def _in_group() -> int | None:
    """What a container may still allocate; pages of files count as free."""
    names = ("max", "current", "stat")
    try:
        texts = [Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in names]
        kept = dict(line.split() for line in texts[2].splitlines())
        files = int(kept["active_file"]) + int(kept["inactive_file"])
        return int(texts[0]) - int(texts[1]) + files  # "max" where there is no limit
    except (OSError, ValueError, KeyError):
        return None
