"""The running mean of a matrix over tokens or sequences: float64 on the device, mergeable."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMatrixMean:
    """Sums matrices and counts what they are sums of; waits for the device in `count` and `mean`.

    Args:
        size: of the square matrix.
    """

    def __init__(self, size: int) -> None:
        """Start with nothing summed."""
        self._size = size
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add the parts of a batch.

        Args:
            sums: `(parts, size, size)`, float64.
            counts: `(parts,)`, how many each part sums; integers or bool.
        """
        if self._sum is None or self._count is None:
            self._sum = torch.zeros(self._size, self._size, dtype=torch.float64, device=sums.device)
            self._count = torch.zeros((), dtype=torch.int64, device=sums.device)
        self._sum += sums.sum(0)
        self._count += counts.sum()

    def merge(self, other: RunningMatrixMean) -> None:
        """Add what `other` summed."""
        if other._sum is not None and other._count is not None:
            self.add(other._sum[None], other._count[None])

    @property
    def count(self) -> int:
        """How many were summed."""
        return 0 if self._count is None else int(self._count)

    def mean(self, name: str, what: str) -> Tensor:
        """The mean, `(size, size)`, float64 on the host.

        Raises:
            ValueError: nothing was summed; the message has the caller's name and what it averages.
        """
        if self._sum is None or self._count is None or not self.count:
            raise ValueError(f"{name}: there must be at least one {what}, got none")
        return (self._sum / self._count).cpu()
