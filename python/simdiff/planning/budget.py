"""Budgets: turn a share of depth or parameters, a speed-up or memory into a number of layers.

All sizes are counted from the parameters. The layers are chosen afterwards, so a number of layers
meets a budget only if removing that many of the smallest layers does. In most models all layers are
equal and this makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from simdiff.errors import SimdiffError

BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}

_USUAL_RATIO = 0.25


@dataclass(frozen=True)
class Budget:
    """The goal of pruning; at most one field is set. Without any, a quarter of the layers goes."""

    num_layers: int | None = None
    ratio: float | None = None
    """Share of the layers to remove; the number is rounded down."""
    parameter_ratio: float | None = None
    """Share of all parameters to remove at least."""
    speed_up: float | None = None
    """Factor by which decoding at batch size 1 becomes faster at least, by the bytes it reads."""
    max_memory: float | None = None
    """Memory into which the weights must fit, in GB of 1e9 bytes."""

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, by its name; a quarter of the layers where nothing was."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return given or {"ratio": _USUAL_RATIO}

    @property
    def needs_sizes(self) -> bool:
        """Whether the number of layers depends on their sizes."""
        return not (self.parameter_ratio is self.speed_up is self.max_memory is None)

    def layers(self, model: Mapping[str, Any]) -> int:
        """The least number of layers whose removal meets the budget.

        The time of decoding a token at batch size 1 is taken to be proportional to the bytes of the
        weights it reads: all of them once, except an input embedding that is not tied to the head.
        The KV cache is ignored and all experts of a mixture count, so the speed-up is an upper
        bound.

        Args:
            model: identity of the model, see `model_identity`.

        Raises:
            SimdiffError: more than one field is set, a value is out of range, or removing all
                layers but one does not meet the budget.
        """
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if len(chosen) > 1:
            raise SimdiffError(f"a budget must be one of its kinds, got {', '.join(chosen)}")
        depth = int(model["num_layers"])
        if self.num_layers is not None:
            return self.num_layers
        if not chosen or self.ratio is not None:
            return layers_for_ratio(depth, _USUAL_RATIO if self.ratio is None else self.ratio)
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
        assert self.max_memory is not None
        return self._by_memory(model, total, self.max_memory)

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

    def _by_memory(self, model: Mapping[str, Any], total: int, max_memory: float) -> int:
        width = BYTES_OF[model["dtype"]]
        if not 0 < max_memory < math.inf:
            raise SimdiffError(f"max_memory must be a positive number of GB, got {max_memory}")
        memory = 1e9 * max_memory
        if memory >= width * total:
            raise SimdiffError(
                f"max_memory must be below the {width * total / 1e9:.4g} GB that the weights take "
                f"now, got {max_memory:g}: nothing has to go"
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
    """The least number of layers that reaches the wanted value, whichever layers they are."""
    gone = list(accumulate(sorted(model["layer_parameters"])))
    for count, parameters in enumerate(gone[:-1], 1):
        # A budget that 3 layers meet exactly must not take a fourth because of rounding.
        if reached(parameters) >= wanted - 1e-12 * abs(wanted):
            return count
    raise SimdiffError(
        f"removing {len(gone) - 1} of {len(gone)} layers must {what}, but it reaches only "
        f"{shown(reached(gone[-2]) if len(gone) > 1 else reached(0))}"
    )


def layers_for_ratio(num_layers: int, ratio: float) -> int:
    """The number of layers that a share of the depth is, rounded down: 0.25 of 30 layers is 7.

    Raises:
        SimdiffError: the ratio is outside (0, 1), or gives less than one layer.
    """
    if not 0 < ratio < 1:
        raise SimdiffError(f"ratio must be above 0 and below 1, got {ratio}")
    # The rounding of 0.3 * 10 must not make it 2 layers.
    count = math.floor(ratio * num_layers + 1e-9)
    if count == 0:
        raise SimdiffError(
            f"ratio must remove at least one of {num_layers} layers "
            f"({1 / num_layers:.4f} or more), got {ratio}"
        )
    return count
