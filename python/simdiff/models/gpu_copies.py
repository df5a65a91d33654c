"""Copies between main memory and a GPU, in a stream of their own while the GPU computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Event: TypeAlias = torch.cuda.Event


class GpuCopies:
    """Begins copies, which are done once the event that is returned has come.

    Whoever computes meanwhile does so in torch's current stream, whichever that is.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @classmethod
    def of(cls, device: torch.device) -> GpuCopies | None:
        """For a GPU; None for any other device."""
        return cls(device) if device.type == "cuda" else None

    def to_gpu(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], Event]:
        """Begin to copy tensors to the GPU.

        Args:
            tensors: in pinned memory, which must stay as it is until the event comes, or in any
                other, for whose copies this waits.
        """
        with torch.cuda.stream(self._stream):
            found = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
            return found, self._stream.record_event()

    def take(self, tensors: Sequence[Tensor], copied: Event) -> None:
        """Let what is computed from now on wait for a copy, whose memory stays until it is done."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(current)

    def to_main(self, tensor: Tensor) -> tuple[Tensor, Event]:
        """Begin to copy a tensor to pinned memory, once what was asked for so far is computed."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            found.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            return found, self._stream.record_event()

    def computed(self) -> Event:
        """An event that comes when what was asked for so far is computed."""
        return torch.cuda.current_stream(self._device).record_event()
