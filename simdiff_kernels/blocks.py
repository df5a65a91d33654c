"""RunningBlockScores: what every run of consecutive layers did to the tokens, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simdiff_kernels.backends import block_scratch_words, resolve_backend, usable_backends
from simdiff_kernels.metrics import BLOCK_METRICS
from simdiff_kernels.ops import (
    OPERATORS,
    as_mask,
    as_rows,
    check_hidden_states,
    has_implementation,
)
from simdiff_kernels.running import NonFiniteError

_NUM_METRICS = len(BLOCK_METRICS)
_STATE_VERSION = 1


class BlockNonFiniteError(NonFiniteError):
    """Some token held NaN or Inf in one of its hidden states; which layers is not kept."""

    def __init__(self, num_nonfinite: int, num_seen: int) -> None:
        """Say how many tokens."""
        self.tokens_by_layer = {}
        self.num_nonfinite = num_nonfinite
        ValueError.__init__(
            self,
            f"hidden states must be finite, found NaN or Inf in {num_nonfinite} of {num_seen} "
            "tokens",
        )


@dataclass(frozen=True)
class BlockSummary:
    """The metrics of every block of layers; float64 CPU tensors of shape `(L + 1, L + 1)`.

    Entry [i, j] with i < j is the block of layers i ... j - 1, which turns hidden state h_i into
    h_j; all other entries are zero. Formulas: `TokenMetrics`, with x = h_i and y = h_j, and
    `simdiff_kernels.angular_distance` of each token's cosine distance.
    """

    num_tokens: int
    """Tokens averaged."""
    num_nonfinite: int
    """Tokens left out of all blocks because of a NaN or Inf in any state."""
    cosine_distance: Tensor
    """Mean over tokens, as are the others but the maximum."""
    squared_difference: Tensor
    squared_difference_maximum: Tensor
    """Of the squared difference, over tokens."""
    absolute_difference: Tensor
    relative_difference: Tensor
    angular_distance: Tensor
    """Mean of arccos(cos) / pi; a zero vector is at 0 of another and at 1/2 of anything else."""
    standard_error: dict[str, Tensor]
    """Of each mean, by name, tokens taken as independent; NaN for a single token."""


class RunningBlockScores:
    """Running reductions of `BLOCK_METRICS` over every pair i < j of the hidden states h_0 ... h_L.

    One state of `11 (L + 1)^2 + 3` numbers however many tokens are seen: sums, sums of squares and
    a maximum, in float64. `update` never waits for the device and its result is bitwise the same
    in every run (on the CPU for any number of threads); states of different batches, devices or
    processes are joined by `merge`. A token with a NaN or Inf in any state is left out of all pairs
    and counted.

    Args:
        num_layers: L; an update takes L + 1 states.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest one for the device.

    Source: SimDiff, arXiv 2604.19520, Eq. 1-5, for blocks as in Gromov et al., arXiv 2403.17887,
    Section 3; the angular distance is their Eq. 7.
    """

    def __init__(self, num_layers: int, *, backend: str | None = None) -> None:
        """Start with no tokens seen."""
        if num_layers < 1:
            raise ValueError(f"RunningBlockScores: num_layers must be at least 1, got {num_layers}")
        self.num_layers = num_layers
        self.backend = backend
        # Where the first update's states live; before it, nowhere.
        self._moments: Tensor | None = None
        self._tallies: Tensor | None = None
        self._scratch: list[Tensor] = []  # one at most; siblings share the list

    def sibling(self) -> RunningBlockScores:
        """Another one of the same kind, empty, that shares what a GPU needs within an update.

        Updates of siblings must follow one another on one stream.
        """
        other = RunningBlockScores(self.num_layers, backend=self.backend)
        other._scratch = self._scratch
        return other

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            states: h_0 ... h_L, `num_layers + 1` tensors of one shape `(..., hidden_size)`, dtype
                (float32, bfloat16, float16 or float64) and device; any strides (a strided last
                dimension is copied first). h_i enters layer i; h_L leaves the last one.
            mask: `(...)`, bool or integer (an `attention_mask`); zero leaves a token out.

        Raises:
            TypeError: wrong dtype.
            ValueError: another number of states, or shapes, dtypes or devices that do not fit; the
                state stays as it was.
        """
        function = "RunningBlockScores.update"
        if len(states) != self.num_layers + 1:
            raise ValueError(
                f"{function}: states must be {self.num_layers + 1} tensors, one before the first "
                f"and one after each of {self.num_layers} layers, got {len(states)}"
            )
        for index, state in enumerate(states):
            check_hidden_states(function, states[0], state, names=("states[0]", f"states[{index}]"))
        device = states[0].device
        mask = as_mask(function, mask, states[0], "states[0]")
        backend = _resolve(self.backend, device)
        rows = [as_rows(state) for state in states]
        scratch = self._scratch_of(device, backend)
        moments, tallies = self._state(device)
        OPERATORS["accumulate_blocks"][backend](moments, tallies, rows, mask, scratch)

    def merge(self, other: RunningBlockScores) -> None:
        """Add the tokens that `other` saw.

        Counts and maxima are exact; sums are added in float64.

        Raises:
            ValueError: a different number of layers.
        """
        if other.num_layers != self.num_layers:
            raise ValueError(
                f"RunningBlockScores.merge: other must have {self.num_layers} layers, "
                f"got {other.num_layers}"
            )
        if other._moments is None or other._tallies is None:
            return
        ours = self._moments
        moments, tallies = self._state(other._moments.device if ours is None else ours.device)
        theirs = other._moments.to(moments.device)
        moments[:-1] += theirs[:-1]
        moments[-1] = torch.maximum(moments[-1], theirs[-1])
        tallies += other._tallies.to(moments.device)

    def finish(self, *, allow_nonfinite: bool = False) -> BlockSummary:
        """Bring the state to the host and summarise it; more updates may follow.

        Args:
            allow_nonfinite: summarise the finite tokens even if others held NaN or Inf.

        Raises:
            NonFiniteError: some token held NaN or Inf.
            ValueError: no token to average.
        """
        moments, tallies = self._on_host()
        num_tokens, num_nonfinite, num_seen = tallies.tolist()
        if num_nonfinite and not allow_nonfinite:
            raise BlockNonFiniteError(num_nonfinite, num_seen)
        if num_tokens == 0:
            raise ValueError(
                f"RunningBlockScores.finish: there must be at least one token to average, got "
                f"{num_seen} seen, of which {num_nonfinite} not finite and all others masked"
            )
        mean = moments[:_NUM_METRICS] / num_tokens
        # Rounding may leave a variance of constant values just below zero.
        spread = (moments[_NUM_METRICS:-1] / num_tokens - mean.square()).clamp_min(0)
        error = (spread / (num_tokens - 1)).sqrt() if num_tokens > 1 else spread * torch.nan
        return BlockSummary(
            num_tokens=num_tokens,
            num_nonfinite=num_nonfinite,
            squared_difference_maximum=moments[-1],
            standard_error={name: error[m].triu(1) for m, name in enumerate(BLOCK_METRICS)},
            **{name: mean[m] for m, name in enumerate(BLOCK_METRICS)},
        )

    def state_dict(self) -> dict[str, Any]:
        """The whole state as CPU tensors and plain values, for `torch.save` or another process."""
        moments, tallies = self._on_host()
        return {
            "version": _STATE_VERSION,
            "metrics": list(BLOCK_METRICS),
            "moments": moments,
            "tallies": tallies,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one from `state_dict`; it moves to a device with the next update.

        Raises:
            ValueError: of another version, other metrics, or another number of layers.
        """
        function = "RunningBlockScores.load_state_dict"
        if state.get("version") != _STATE_VERSION or list(state["metrics"]) != list(BLOCK_METRICS):
            raise ValueError(
                f"{function}: state must have version {_STATE_VERSION} and metrics "
                f"{', '.join(BLOCK_METRICS)}, got version {state.get('version')} and "
                f"{', '.join(state.get('metrics', []))}"
            )
        moments, tallies = state["moments"], state["tallies"]
        wanted = (2 * _NUM_METRICS + 1, self.num_layers + 1, self.num_layers + 1)
        if tuple(moments.shape) != wanted or tuple(tallies.shape) != (3,):
            raise ValueError(
                f"{function}: state must have {self.num_layers} layers, got {moments.shape[-1] - 1}"
            )
        self._moments, self._tallies = moments.double().clone(), tallies.long().clone()

    def _state(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._moments is None or self._tallies is None:
            self._moments, self._tallies = empty_block_state(self.num_layers, device)
        elif self._moments.device != device:
            self._moments, self._tallies = self._moments.to(device), self._tallies.to(device)
        return self._moments, self._tallies

    def _scratch_of(self, device: torch.device, backend: str) -> Tensor | None:
        words = block_scratch_words(backend, self.num_layers + 1)
        if words == 0:
            return None
        kept = self._scratch
        if not kept or kept[0].device != device or kept[0].numel() != words:
            kept[:] = [torch.zeros(words, dtype=torch.int64, device=device)]
        return kept[0]

    def _on_host(self) -> tuple[Tensor, Tensor]:
        if self._moments is None or self._tallies is None:
            return empty_block_state(self.num_layers, torch.device("cpu"))
        return self._moments.to("cpu", copy=True), self._tallies.to("cpu", copy=True)


def empty_block_state(num_layers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`moments` and `tallies` of `reference.accumulate_blocks` before the first token."""
    num_states = num_layers + 1
    moments = torch.zeros(
        2 * _NUM_METRICS + 1, num_states, num_states, dtype=torch.float64, device=device
    )
    return moments, torch.zeros(3, dtype=torch.int64, device=device)


def _resolve(backend: str | None, device: torch.device) -> str:
    """The backend named, or the fastest one for the device that has the operator."""
    if backend is None:
        usable = (*usable_backends(device), "reference")
        return next(b for b in usable if has_implementation("accumulate_blocks", b, device))
    name = resolve_backend(backend, device)
    if not has_implementation("accumulate_blocks", name, device):
        raise ValueError(f"backend {name!r} has no accumulate_blocks on {device} tensors here")
    return name


_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
