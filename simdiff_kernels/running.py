"""RunningScores: what every layer did to the tokens of a calibration set, without keeping them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .backends import num_parts, resolve_backend
from .metrics import METRICS, TokenMetrics, result_dtype
from .ops import OPERATORS, as_mask, as_rows, check_hidden_states
from .running_base import RunningBase, grown
from .running_states import (
    NUM_COUNTS,
    NUM_METRICS,
    append_state,
    empty_state,
    join_states,
)
from .summaries import RunningSummary, summary_of


class RunningScores(RunningBase):
    """Running reductions of `token_metrics` over any number of batches, one state per layer.

    Of each token, with x the hidden state that enters a layer, y the one that leaves it and d = y -
    x: 1 - cos(x, y), sum d^2, sum |d| / hidden_size, ||d|| / ||x||, ||x|| and ||y||. Keeps, for
    each layer and metric, the sum, the sum of squares, the maximum and the token that attained it:
    216 bytes a layer however many tokens are seen (14 KB on a GPU, in 64 parts, and 32 bytes for
    each token of the largest batch, in which an update leaves its row sums). Sums are float64.
    `update` never waits for the device, allocates nothing there after a layer's largest batch, and
    its result is bitwise the same in every run; states of different batches, devices or processes
    are joined by `merge`.

    Args:
        num_layers: how many layers are scored.
        keep_tokens: also keep the metrics of every token, for `tokens`.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest one for the device.

    Source: SimDiff, arXiv 2604.19520, Eq. 1-5, plus the maxima and standard errors.
    """

    _METRICS = METRICS
    _VERSIONS = range(2, 3)  # 1 had no parts

    def __init__(
        self, num_layers: int, *, keep_tokens: bool = False, backend: str | None = None
    ) -> None:
        """Start with no tokens seen."""
        super().__init__(num_layers, backend)
        self.keep_tokens = keep_tokens
        # For the CPU all states are made here, as two tensors: small ones made one by one in the
        # middle of a forward pin the heap between its large ones (+80 MB resident on SmolLM2).
        # On other devices a layer's state is made with its first batch, where the layer lives.
        self._host_moments, self._host_counts = empty_state(num_layers, 1)
        self._moments: list[Tensor | None] = [None] * num_layers
        self._counts: list[Tensor | None] = [None] * num_layers
        # Where a GPU leaves the row sums of one update: made once per layer, so that later updates
        # allocate nothing and may run on streams of their own or be replayed by a graph.
        # A larger batch gets a larger one; a graph may still replay with the earlier one.
        self._scratch: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._tokens: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def update(self, layer: int, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of one batch to the state of one layer.

        Args:
            layer: 0 to num_layers - 1.
            before: hidden states that enter the layer, `(..., hidden_size)`; float32, bfloat16,
                float16 or float64; any strides (a strided last dimension is copied first).
            after: hidden states that leave it; shape, dtype and device of `before`.
            mask: `(...)`, bool or integer (an `attention_mask`); zero leaves a token out.

        Raises:
            TypeError: wrong dtype.
            ValueError: shapes, dtypes or devices that do not fit; the state stays as it was.
            IndexError: no such layer.
        """
        self._check_layer("update", layer)
        check_hidden_states("RunningScores.update", before, after)
        mask = as_mask("RunningScores.update", mask, before, "before")
        backend = resolve_backend(self.backend, before.device)
        x, y = as_rows(before), as_rows(after)
        per_token = None
        if self.keep_tokens:
            per_token = x.new_empty((NUM_METRICS, *x.shape[:2]), dtype=result_dtype(x.dtype))
        parts = num_parts(backend)
        scratch = self._scratch_of(layer, x) if parts > 1 else None
        moments, counts = self._state(layer, before.device, parts)
        OPERATORS["accumulate"][backend](moments, counts, x, y, mask, per_token, scratch)
        if per_token is not None:
            self._tokens[layer].append(per_token.flatten(1))

    def merge(self, other: RunningScores) -> None:
        """Add the tokens that `other` saw, as if they had come after those seen here.

        Counts, maxima and indices are exact; sums are added in float64.

        Raises:
            ValueError: a different number of layers, or only one of the two keeps tokens.
        """
        self._check_num_layers("merge: other", other.num_layers)
        self._check_option("merge: other", "keep_tokens", other.keep_tokens)
        for layer in range(self.num_layers):
            moments, counts = other._moments[layer], other._counts[layer]
            if moments is None or counts is None:
                continue
            theirs = join_states(moments, counts)
            ours = self._moments[layer]
            if ours is None:
                ours, _ = self._state(layer, moments.device, len(moments))
            our_counts = self._counts[layer]
            assert our_counts is not None
            append_state(ours, our_counts, *(state.to(ours.device) for state in theirs))
            self._tokens[layer].extend(tokens.to(ours.device) for tokens in other._tokens[layer])

    def tokens(self, layer: int) -> TokenMetrics:
        """The metrics of every token seen by a layer, flat and in order; needs `keep_tokens`.

        Masked and non-finite tokens are included, so that `MetricSummary.argmax` points into these
        tensors: `(num_tokens_seen,)`, float64 for float64 states, float32 otherwise.

        Raises:
            IndexError: no such layer.
            ValueError: constructed without `keep_tokens`, or no token was seen.
        """
        self._check_layer("tokens", layer)
        if not self.keep_tokens:
            raise ValueError("RunningScores.tokens: construct with keep_tokens=True, got False")
        if not self._tokens[layer]:
            raise ValueError(f"RunningScores.tokens: layer {layer} has seen no tokens")
        return TokenMetrics(*torch.cat(self._tokens[layer], dim=1).unbind(0))

    def finish(self, *, allow_nonfinite: bool = False) -> RunningSummary:
        """Bring the states to the host and summarise them; more updates may follow.

        Args:
            allow_nonfinite: summarise the finite tokens even if others held NaN or Inf.

        Raises:
            NonFiniteError: some token held NaN or Inf.
            ValueError: a layer without a single token to average.
        """
        return summary_of(*self._on_host(), allow_nonfinite=allow_nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """The whole state as CPU tensors and plain values, for `torch.save` or another process.

        `moments` is `(num_layers, parts, 3, num_metrics)`: a GPU deals out the tokens of an update
        among parts, which are kept apart so that an interrupted pass ends with the same bits.
        """
        parts = max((len(moments) for moments in self._moments if moments is not None), default=1)
        moments, counts = empty_state(self.num_layers, parts)
        for layer in range(self.num_layers):
            ours, our_counts = self._moments[layer], self._counts[layer]
            if ours is not None and our_counts is not None:
                moments[layer, : len(ours)] = ours.cpu()
                counts[layer, : len(our_counts)] = our_counts.cpu()
                counts[layer, :, NUM_METRICS + 2] = counts[layer, 0, NUM_METRICS + 2]
        state = self._saved(moments, counts)
        if self.keep_tokens:
            state["tokens"] = [
                torch.cat(tokens, dim=1).cpu() if tokens else torch.empty(NUM_METRICS, 0)
                for tokens in self._tokens
            ]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one from `state_dict`; it moves to a device with the next update.

        Raises:
            ValueError: a state of another version, of other metrics or another number of layers, or
                with the metrics of every token where this one keeps none, or the other way round.
        """
        moments, counts = self._read(state)
        num_layers, parts = moments.shape[:2]
        shapes = (num_layers, parts, 3, NUM_METRICS), (num_layers, parts, NUM_COUNTS)
        if (tuple(moments.shape), tuple(counts.shape)) != shapes:
            raise ValueError(
                f"RunningScores.load_state_dict: state must have moments {shapes[0]} and counts "
                f"{shapes[1]}, got {tuple(moments.shape)} and {tuple(counts.shape)}"
            )
        self._check_num_layers("load_state_dict: state", num_layers)
        self._check_option("load_state_dict: state", "keep_tokens", "tokens" in state)
        self._moments, self._counts = list(moments), list(counts)
        self._tokens = [[tokens.clone()] for tokens in state.get("tokens", ())] or [
            [] for _ in range(self.num_layers)
        ]

    def _check_layer(self, method: str, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise IndexError(
                f"RunningScores.{method}: layer must be in 0 to {self.num_layers - 1}, got {layer}"
            )

    def _state(self, layer: int, device: torch.device, parts: int) -> tuple[Tensor, Tensor]:
        moments, counts = self._moments[layer], self._counts[layer]
        if moments is not None and counts is not None:
            if moments.device == device and moments.shape[0] == parts:
                return moments, counts
            old = [state.to(device) for state in join_states(moments, counts)]
            moments, counts = empty_state(1, parts, device)
            append_state(moments[0], counts[0], *old)
            self._tokens[layer] = [tokens.to(device) for tokens in self._tokens[layer]]
            moments, counts = moments[0], counts[0]
        elif device.type == "cpu" and parts == 1:
            moments, counts = self._host_moments[layer], self._host_counts[layer]
        else:
            moments, counts = (state[0] for state in empty_state(1, parts, device))
        self._moments[layer], self._counts[layer] = moments, counts
        return moments, counts

    def _scratch_of(self, layer: int, states: Tensor) -> Tensor:
        words = 4 * states.shape[0] * states.shape[1]
        return grown(self._scratch[layer], words, torch.float64, states.device)

    def _on_host(self) -> tuple[Tensor, Tensor]:
        moments, counts = (state[:, 0] for state in empty_state(self.num_layers, 1))
        for layer in range(self.num_layers):
            theirs, their_counts = self._moments[layer], self._counts[layer]
            if theirs is not None and their_counts is not None:
                joined = join_states(theirs.cpu(), their_counts.cpu())
                moments[layer], counts[layer] = joined
        return moments, counts
