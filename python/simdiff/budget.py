"""Budgets: from a share of depth or parameters, a speed-up or memory to a number of layers.

All sizes are counted from the parameters; the plan is chosen afterwards, so a number of layers is
enough for a budget only if the smallest layers of the model already meet it. In most models all
layers are equal and this makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.selection import layers_for_ratio

BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Budget:
    """What pruning has to reach; at most one of the fields is set, and none means a quarter."""

    num_layers: int | None = None
    ratio: float | None = None
    """Share of the layers that go, rounded down."""
    parameter_ratio: float | None = None
    """At least this share of all parameters goes."""
    speed_up: float | None = None
    """Decoding at batch 1 gets at least so many times faster, by the bytes it reads."""
    memory: float | None = None
    """The weights fit into so many bytes."""

    def layers(self, model: Mapping[str, Any]) -> int:
        """The least number of layers that meets the budget.

        Decoding one token at batch 1 reads every weight once but for the rows of an input embedding
        that is not the head too, so that its time goes with those bytes. It ignores the KV cache,
        and reads all experts of a mixture: a bound from above on what caching allows.

        Args:
            model: of `model_identity`.

        Raises:
            SimdiffError: more than one field set, a value out of range, or a budget that removing
                all layers but one does not meet.
        """
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if len(chosen) > 1:
            raise SimdiffError(f"a budget must be one of its kinds, got {', '.join(chosen)}")
        depth = int(model["num_layers"])
        if self.num_layers is not None:
            return self.num_layers
        if not chosen or self.ratio is not None:
            return layers_for_ratio(depth, 0.25 if self.ratio is None else self.ratio)
        if "layer_parameters" not in model:
            raise SimdiffError(
                "a budget of parameters, speed-up or memory needs the sizes of the layers, which "
                "these scores lack: score the model again with `simdiff score`"
            )
        total = int(model["num_parameters"])
        if self.parameter_ratio is not None:
            return self._by_parameters(model, total, self.parameter_ratio)
        if self.speed_up is not None:
            read = total - int(model["embedding_parameters"])
            return self._by_speed(model, read, self.speed_up)
        assert self.memory is not None
        return self._by_memory(model, total, self.memory)

    def _by_parameters(self, model: Mapping[str, Any], total: int, ratio: float) -> int:
        if not 0 < ratio < 1:
            raise SimdiffError(f"parameter_ratio must be above 0 and below 1, got {ratio}")
        return _least(
            model, lambda gone: gone / total, ratio, f"remove {ratio:.4g} of the parameters"
        )

    def _by_speed(self, model: Mapping[str, Any], read: int, speed_up: float) -> int:
        if not 1 < speed_up < math.inf:
            raise SimdiffError(f"speed_up must be above 1, got {speed_up}")
        return _least(
            model,
            lambda gone: read / (read - gone),
            speed_up,
            f"decode {speed_up:.4g} times faster",
        )

    def _by_memory(self, model: Mapping[str, Any], total: int, memory: float) -> int:
        width = BYTES_OF[model["dtype"]]
        if not 0 < memory < math.inf:
            raise SimdiffError(f"memory must be a positive number of bytes, got {memory}")
        if memory >= width * total:
            raise SimdiffError(
                f"memory must be below the {width * total} bytes that the weights take now, "
                f"got {memory:.0f}: nothing has to go"
            )
        return _least(
            model,
            lambda gone: -width * (total - gone),
            -memory,
            f"fit the weights into {memory:.0f} bytes",
            shown=lambda value: f"{-value:.0f} bytes",
        )


def _least(
    model: Mapping[str, Any],
    reached: Callable[[int], float],
    wanted: float,
    what: str,
    shown: Callable[[float], str] = lambda value: f"{value:.4g}",
) -> int:
    """The fewest layers that reach it, whichever they are."""
    gone = list(accumulate(sorted(model["layer_parameters"])))
    for count, parameters in enumerate(gone[:-1], 1):
        # A budget such as the share of exactly 3 layers must not ask for a fourth by rounding.
        if reached(parameters) >= wanted - 1e-12 * abs(wanted):
            return count
    raise SimdiffError(
        f"removing {len(gone) - 1} of {len(gone)} layers must {what}, but it reaches only "
        f"{shown(reached(gone[-2]) if len(gone) > 1 else reached(0))}"
    )
