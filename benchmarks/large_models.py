"""Memory, disk and time of streamed commands for the shapes of large models, by arithmetic.

    python benchmarks/large_models.py

It prints the table of docs/large-models.md. Nothing is measured here: bytes follow from the shapes
of `sparse_checkpoint.py` in bfloat16, seconds from the rates below, which are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparse_checkpoint import SHAPES, config_of

from simdiff.models.loading import meta_model
from simdiff.models.streamed import DEFAULT_MEMORY

WINDOWS, LENGTH, BATCH = 32, 512, 8
RATES = {
    "laptop": (2e9, 0.5e12),
    "one H100": (5e9, 400e12),
    "eight H100": (20e9, 8 * 400e12),
}
"""Bytes per second of the disks, and operations per second of matrix products, of all GPUs."""


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs of a model."""

    hidden: int
    layers: int
    layer_bytes: int
    outside_bytes: int

    @classmethod
    def of(cls, name: str) -> Shape:
        """The shape of a name in `SHAPES`."""
        model = meta_model(config_of(name))
        parameters = [2 * parameter.numel() for parameter in model.parameters()]
        layer = sum(2 * parameter.numel() for parameter in model.model.layers[0].parameters())
        depth = len(model.model.layers)
        return cls(SHAPES[name][0], depth, layer, sum(parameters) - depth * layer)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.layers * self.layer_bytes + self.outside_bytes

    def states(self, tokens: int) -> int:
        """Bytes of the states of some tokens at one depth."""
        return 2 * tokens * self.hidden

    @property
    def kept(self) -> int:
        """Bytes of the states that `score` writes: after every layer, of all windows."""
        return self.layers * self.states(WINDOWS * LENGTH)

    def memory(self, streamed: bool) -> int:
        """Bytes of weights and states that a pass of scores holds at once.

        Streamed, with one window at a time where all L + 1 states of a batch are needed.
        """
        if not streamed:
            return self.weights + (self.layers + 1) * self.states(BATCH * LENGTH)
        held = min(DEFAULT_MEMORY, self.kept)
        return 2 * self.layer_bytes + held + (self.layers + 1) * self.states(LENGTH)

    def seconds(self, command: str, disk: float, products: float) -> float:
        """Of a pass: reading and computing run at the same time, the longer one counts."""
        tokens = WINDOWS * LENGTH
        computing = self.layers * self.layer_bytes * tokens / products  # 2 per parameter of 2 bytes
        if command == "score":  # states are written meanwhile, and read again at the end
            return max((self.weights + self.kept) / disk, computing) + self.kept / disk
        return max(self.weights / disk, 2 * computing)  # eval: the dense and the pruned model


def table() -> str:
    """The table as Markdown."""
    titles = ["model", "weights", "memory, whole", "memory, streamed", "disk for `score`"]
    titles += [f"`{name}`, {machine}" for machine in RATES for name in ("score", "eval")]
    rows = [titles, ["---"] * len(titles)]
    for name in SHAPES:
        shape = Shape.of(name)
        sizes = shape.weights, shape.memory(False), shape.memory(True), shape.kept
        times = [shape.seconds(c, *rates) for rates in RATES.values() for c in ("score", "eval")]
        rows.append([name.upper(), *map(_size, sizes), *map(_time, times)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:.2g} h"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(table())


if __name__ == "__main__":
    main()
