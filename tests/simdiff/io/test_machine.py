"""The memory that a device has free."""

from __future__ import annotations

import pytest
import torch

from simdiff.io import machine
from simdiff.io.machine import available_memory
from support.proc_files import Files

CPU = torch.device("cpu")


def test_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(meminfo="MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\nCached: 7 kB\n")
    monkeypatch.setattr(machine, "Path", files)
    assert available_memory(CPU) == 2 * 2**20
    group = {"max": "900", "current": "700", "stat": "anon 5\nactive_file 20\ninactive_file 30"}
    files.texts |= {f"/sys/fs/cgroup/memory.{name}": text for name, text in group.items()}
    assert available_memory(CPU) == 900 - 700 + 50
    files.texts["/sys/fs/cgroup/memory.max"] = "max"
    assert available_memory(CPU) == 2 * 2**20
    files.texts["meminfo"] = "MemTotal: 9 kB\n"
    assert available_memory(CPU) is None
    del files.texts["meminfo"]
    assert available_memory(CPU) is None
    # Of the second GPU 1000 bytes are free, and of 300 that torch reserved it uses 120.
    second = torch.device("cuda", 1)
    for name, value in (
        ("mem_get_info", (1000, 9000)),
        ("memory_reserved", 300),
        ("memory_allocated", 120),
    ):
        values = {second: value}
        monkeypatch.setattr(torch.cuda, name, values.__getitem__)
    assert available_memory(second) == 1180
