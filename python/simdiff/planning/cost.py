"""The cost of evaluating plans, in layers run on one window.

The head counts as as many layers as it has parameters of one. Plans that are read together share
what they have in common: the states that enter layer i depend on the removed layers before i alone,
and those of the dense model are kept, of all layers where they fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from simdiff.models.structure import find_decoder_layers

Plan = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """A number of layers and of heads, each run on one window."""

    layers: int = 0
    heads: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.layers + other.layers, self.heads + other.heads)

    def __mul__(self, times: int) -> Cost:
        """So many times."""
        return Cost(self.layers * times, self.heads * times)


@dataclass(frozen=True)
class Prices:
    """What a model's layers and head cost."""

    num_layers: int
    head: float = 0.0
    """Parameters of the head by those of a layer."""

    def total(self, cost: Cost) -> float:
        """In layers run on one window."""
        return cost.layers + self.head * cost.heads

    @property
    def dense(self) -> Cost:
        """The whole model on one window."""
        return Cost(self.num_layers, 1)

    def plans(self, plans: Sequence[Plan]) -> Cost:
        """Some plans on one window, where the dense model has been read before.

        A layer i that a plan keeps runs once for each set of removed layers before i; with none it
        does not run, since the dense states are kept.
        """
        runs: set[tuple[Plan, int]] = set()
        for plan in set(plans):
            before: list[int] = []
            for layer in range(self.num_layers):
                if layer in plan:
                    before.append(layer)
                elif before:
                    runs.add((tuple(before), layer))
        return Cost(len(runs), len(set(plans)))

    def greedy(self, num_remove: int, num_windows: int) -> Cost:
        """Greedy search with kept states, about: half of the kept layers run for a candidate.

        To remove layer k + 1 it evaluates L - k plans, in each of which (L - k - 1) / 2 layers
        follow the candidate on average, and runs what its step begins from.
        """
        depths = [self.num_layers - k for k in range(num_remove)]
        layers = sum(depth * (depth - 1) // 2 + depth for depth in depths)
        return Cost(layers, sum(depths) + 1) * num_windows


@dataclass
class Spent:
    """What a search has read, and may."""

    prices: Prices
    budget: float
    cost: Cost = field(default_factory=Cost)
    reads: int = 0
    windows: set[int] = field(default_factory=set)

    @property
    def left(self) -> float:
        """Of the budget, in layers on a window; below 0 where it was exceeded."""
        return self.budget - self.prices.total(self.cost)

    def of(self, plans: Sequence[Plan], windows: Collection[int]) -> Cost:
        """What it costs to read plans on windows, and the dense model where it was not read."""
        new = len(set(windows) - self.windows)
        return self.prices.plans(plans) * len(windows) + self.prices.dense * new

    def price(self, plans: Sequence[Plan], windows: Collection[int]) -> float:
        """`of` in layers on a window."""
        return self.prices.total(self.of(plans, windows))


# The head reads every token, or every second to fourth where it costs more than a quarter of the
# layers: with 262144 tokens in the vocabulary and layers of 640 wide it costs as much as 30 layers.
MOST_STRIDE = 4


def head_stride(prices: Prices) -> int:
    """Of how many tokens the head reads one, for the divergence of a plan."""
    return max(1, min(MOST_STRIDE, math.ceil(4 * prices.head / prices.num_layers)))


def prices_of(model: PreTrainedModel) -> Prices:
    """The prices of a model, from the parameters of its layers and of its head."""
    layers = find_decoder_layers(model).modules
    each = sum(p.numel() for p in layers.parameters()) / len(layers)
    head = model.get_output_embeddings()
    size = 0 if head is None else sum(p.numel() for p in head.parameters())
    return Prices(len(layers), size / max(1.0, each))
