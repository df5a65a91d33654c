"""What `RunningScores` and `RunningBlockScores` have in common: checks, saved states, scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class RunningBase:
    """Running scores of the layers of one model; messages begin with the name of the class."""

    _METRICS: ClassVar[tuple[str, ...]]
    """Names that a saved state must carry."""
    _VERSIONS: ClassVar[range]
    """Versions of saved states that can be read; the last one is written."""

    def __init__(self, num_layers: int, backend: str | None) -> None:
        """Remember what is scored, and by which backend.

        Raises:
            ValueError: no layer.
        """
        if num_layers < 1:
            raise ValueError(
                f"{type(self).__name__}: num_layers must be at least 1, got {num_layers}"
            )
        self.num_layers = num_layers
        self.backend = backend

    def _check_num_layers(self, what: str, num_layers: int) -> None:
        """Refuse another number of layers; `what` is a method and who has it."""
        if num_layers != self.num_layers:
            raise ValueError(
                f"{type(self).__name__}.{what} must have {self.num_layers} layers, got {num_layers}"
            )

    def _check_option(self, what: str, option: str, value: bool) -> None:
        """Refuse another value of an option of the constructor."""
        own = getattr(self, option)
        if value != own:
            raise ValueError(f"{type(self).__name__}.{what} must have {option}={own}, got {value}")

    def _saved(self, moments: Tensor, counts: Tensor) -> dict[str, Any]:
        """What every saved state holds."""
        return {
            "version": self._VERSIONS[-1],
            "metrics": list(self._METRICS),
            "moments": moments,
            "counts": counts,
        }

    def _read(self, state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """`moments` and `counts` of a saved state, copied; their shapes are still to be checked.

        Raises:
            ValueError: another version, or other metrics.
        """
        version, metrics = state.get("version"), list(state.get("metrics", ()))
        if version not in self._VERSIONS or metrics != list(self._METRICS):
            known = " to ".join(map(str, sorted({self._VERSIONS[0], self._VERSIONS[-1]})))
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: state must have version {known} and "
                f"metrics {', '.join(self._METRICS)}, got version {version} and "
                f"{', '.join(metrics)}"
            )
        counts = state["counts"] if "counts" in state else state["tallies"]  # its earlier name
        return state["moments"].double().clone(), counts.long().clone()


def grown(kept: list[Tensor], count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The last tensor of a list if it is large enough, else a new one, appended.

    Memory that an update needs grows so with the largest batch. Smaller tensors stay: a CUDA graph
    may still replay with them.
    """
    if not kept or kept[-1].device != device or kept[-1].numel() < count:
        kept.append(torch.empty(count, dtype=dtype, device=device))
    return kept[-1]
