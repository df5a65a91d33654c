"""GPUs divided among the processes of a machine, by what torch would say of them."""

from __future__ import annotations

import pytest
import torch

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.models.devices import own_device, own_gpus, own_memory


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs, the second of which has more memory left than the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 + 100 * (gpu == 5), 2000))


@pytest.mark.usefixtures("machine")
def test_each_process_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [own_device(name) for name in ("cuda", "cpu", "auto")] == ["cuda", "cpu", "auto"]
    assert own_memory() is None
    monkeypatch.setattr(ranks, "_local", (1, 2))
    assert [own_device(name) for name in ("cuda", "cuda:0", "auto")] == ["cuda:4", "cuda:0", "auto"]
    assert own_gpus() == range(4, 8)
    memory = own_memory()
    assert memory is not None
    assert memory.pop("cpu") > 0
    assert memory == {4: 900, 5: 990, 6: 900, 7: 900}
    monkeypatch.setattr(ranks, "_local", (2, 3))
    assert own_gpus() == range(4, 6)


@pytest.mark.usefixtures("machine")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_local", (8, 9))
    for device in ("cuda", "auto"):
        with pytest.raises(
            SimdiffError, match="9 processes on a machine must have a GPU each, got 8"
        ):
            own_device(device)
    assert own_device("cpu") == "cpu"
    assert own_device("cuda:0") == "cuda:0"
