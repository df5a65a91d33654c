"""Hidden states of training examples, computed once for each example if they fit."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from simdiff.recovery.training.data import Examples

# Limit of the bytes of hidden states that are kept for later epochs: 1 million tokens of hidden
# size 576 in bfloat16 take 1.2 GB. Beyond it every example is read in every epoch.
MEMORY_BUDGET = 2 << 30


class ExampleStates:
    """Provides the states of examples by their indices.

    Each example is read alone, so that its states are bitwise the same in any batch, and whether
    they were kept or are computed again after an interruption.

    Args:
        read: computes the states `(length, hidden_size)` of one example.
        examples: the training examples.
        token_bytes: size of one token's state; None keeps none.
        device: where the states are wanted.
    """

    def __init__(
        self,
        read: Callable[[Examples], Tensor],
        examples: Examples,
        token_bytes: int | None,
        device: torch.device,
    ) -> None:
        """Store the arguments; nothing is read yet."""
        self._read, self._examples, self._device = read, examples, device
        fits = token_bytes is not None and examples.num_tokens * token_bytes <= MEMORY_BUDGET
        self.keeps = fits
        """Whether the states of an example are kept after it was read."""
        self._kept: dict[int, Tensor] = {}
        self.seconds = 0.0
        """Seconds spent on reading."""
        self.num_read = 0
        """Number of examples read; those whose states are kept are read once."""

    def states(self, indices: Tensor) -> list[Tensor]:
        """The states of each example, `(its length, hidden_size)`."""
        return [self._state(int(index)) for index in indices]

    def forget(self) -> None:
        """Drop the kept states."""
        self._kept.clear()
        self.seconds, self.num_read = 0.0, 0

    def seconds_for(self, read: int) -> float:
        """Seconds for examples that are asked for `read` times in all, by those read so far."""
        each = self.seconds / max(1, self.num_read)
        return each * (min(read, len(self._examples)) if self.keeps else read)

    def _state(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index].to(self._device)
        start = time.perf_counter()
        result = self._read(self._examples.take(torch.tensor([index])))
        if self.keeps:  # timed too, since a copy to the host waits for the device
            self._kept[index] = result.cpu()
        self.seconds += time.perf_counter() - start
        self.num_read += 1
        return result
