"""RunningBlockGroups: the running states of every block of layers, one for each group of sequences.

In addition to the metrics of simdiff_kernels, for every pair i < j of the states h_0 ... h_L:

- norm change: the mean over tokens of (b - a)^2 / (2 a b) = cosh(ln(b / a)) - 1 with a = ||h_i||,
  b = ||h_j||. It is 0 for equal norms, the same for growth and shrinkage by the same factor, and
  unbounded. From a zero vector it is 0 to another zero vector and 1 to anything else.
- last-token angle: the mean over sequences of arccos(cos(h_i, h_j)) / pi at the last real token,
  which takes a few rows per batch. Source: Gromov et al., arXiv 2403.17887, Eq. 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simdiff.scoring.block_scores import BlockScores, Matrix, block_scores_of
from simdiff_kernels import (
    BLOCK_METRICS,
    COUNTED,
    LEFT_OUT,
    BlockScratch,
    accumulate_blocks,
    block_summary_of,
    empty_block_state,
    join_block_states,
)

if TYPE_CHECKING:
    from simdiff.scoring.running_groups import BatchTokens, RunningGroups


class RunningBlockGroups:
    """The running states of all blocks; a `BlockSink` for `LayerHooks`.

    Args:
        groups: tells which tokens count, and receives the row sums of the layers.
        num_groups: upper limit of the number of groups.
        backend: backend of simdiff_kernels; None takes the fastest one for the device.
    """

    def __init__(self, groups: RunningGroups, num_groups: int, backend: str | None) -> None:
        """Start with no tokens seen."""
        self.num_layers = groups.num_layers
        self._groups, self._num_groups, self._backend = groups, num_groups, backend
        self._scratch, self._last_scratch = BlockScratch(), BlockScratch()
        # Moments and counts of all tokens, those of the last tokens, and the norm changes, each
        # with the groups as its first axis.
        self._state: tuple[Tensor, ...] | None = None

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Add the tokens of the current batch, by the states h_0 ... h_L."""
        batch, device = self._groups.batch, states[0].device
        states = [batch.by_row(state) for state in states]
        if self._state is None:
            self._state = self._empty(device)
        elif self._state[0].device != device:
            self._state = tuple(tensor.to(device) for tensor in self._state)
        sums = self._groups.sums_of_all_layers(states)
        kinds = batch.kinds_on(device)
        accumulate_blocks(
            self._state[0],
            self._state[1],
            states,
            kinds=kinds,
            sums=sums,
            scratch=self._scratch,
            backend=self._backend,
            **batch.places(batch.length),
        )
        self._add_last_tokens(states, batch, kinds)
        changes = norm_changes(sums, kinds)
        self._state[4].add_(_by_group(changes, batch, self._num_groups))

    def _add_last_tokens(
        self, states: Sequence[Tensor], batch: BatchTokens, kinds: Tensor | None
    ) -> None:
        """Add the last counted token of each sequence, as a batch of one token per sequence."""
        assert self._state is not None
        used = None
        if kinds is None:
            last = [state[:, -1:] for state in states]
        else:  # padding may be on either side
            counted = kinds == COUNTED
            positions = torch.arange(1, batch.length + 1, device=kinds.device)
            place = (counted * positions).argmax(1)
            rows = torch.arange(batch.rows, device=kinds.device)
            last = [state[rows, place].unsqueeze(1) for state in states]
            used = torch.where(counted.any(1, keepdim=True), COUNTED, LEFT_OUT).to(torch.uint8)
        accumulate_blocks(
            self._state[2],
            self._state[3],
            last,
            kinds=used,
            scratch=self._last_scratch,
            backend=self._backend,
            **batch.places(1),
        )

    def _empty(self, device: torch.device) -> tuple[Tensor, ...]:
        blocks = empty_block_state(self.num_layers, device, self._num_groups)
        last = empty_block_state(self.num_layers, device, self._num_groups)
        changes = blocks[0].new_zeros(self._num_groups, *blocks[0].shape[2:])
        return *blocks, *last, changes

    def part(self, groups: slice) -> tuple[Tensor, ...]:
        """The states of some groups on the host; see `RunningGroups.part`."""
        state = self._empty(torch.device("cpu")) if self._state is None else self._state
        return tuple(tensor[groups].cpu().clone() for tensor in state)

    def put(
        self, parts: Sequence[tuple[slice, tuple[Tensor, ...]]], num_tokens: int, num_sequences: int
    ) -> None:
        """Take the states of all groups that processes have made; see `RunningGroups.put`.

        Args:
            parts: the groups and the states of each process.
            num_tokens, num_sequences: that all have seen together.
        """
        state = self._empty(torch.device("cpu")) if self._state is None else self._state
        self._state = tuple(tensor.cpu() for tensor in state)
        for groups, theirs in parts:
            for ours, tensor in zip(self._state, theirs, strict=True):
                ours[groups] = tensor
        self._state[1][:, -1], self._state[3][:, -1] = num_tokens, num_sequences

    def finish(self) -> tuple[BlockScores, Matrix]:
        """The scores of all groups together, and their last-token angles.

        Raises:
            NonFiniteError, ValueError: see `RunningBlockScores.finish`.
        """
        return self._finish(slice(0, self._num_groups))

    def finish_group(self, group: int) -> tuple[BlockScores, Matrix]:
        """The scores and last-token angles of one group; raises what `finish` raises."""
        return self._finish(slice(group, group + 1))

    def _finish(self, groups: slice) -> tuple[BlockScores, Matrix]:
        if self._state is None:
            raise ValueError(
                "RunningBlockGroups.finish: there must be at least one batch, got none"
            )
        *states, changes = (tensor[groups].cpu() for tensor in self._state)
        blocks, last = join_block_states(*states[:2]), join_block_states(*states[2:])
        summary = block_summary_of(*blocks)
        norm_change = changes[0].clone()
        for change in changes[1:]:
            norm_change += change
        # Rounding may make a sum of zeros slightly negative.
        norm_change = norm_change.clamp_min(0) / summary.num_tokens
        angles = last[0][BLOCK_METRICS.index("angular_distance")] / last[1][0]
        return block_scores_of(summary, norm_change), tuple(map(tuple, angles.tolist()))


def norm_changes(sums: Tensor, kinds: Tensor | None = None) -> Tensor:
    """The norm change of every block, summed over the tokens of each sequence.

    (b - a)^2 / (2 a b) = (a / b + b / a) / 2 - 1. With the norms of the states as the rows of a
    matrix, one matrix product gives the sums over tokens of all quotients.

    Args:
        sums: row sums of all layers, `(L, rows, length, 4)`.
        kinds: uint8 `(rows, length)`. Tokens of a kind other than `COUNTED` are left out, and so
            are tokens that are not finite in some state.

    Returns:
        `(rows, L + 1, L + 1)`, float64; zero for i >= j.
    """
    norms = torch.cat([sums[..., 0], sums[-1:, ..., 1]]).sqrt().movedim(0, 1)  # (rows, L + 1, T)
    used = norms.isfinite().all(1, keepdim=True)
    if kinds is not None:
        used = used & (kinds == COUNTED).unsqueeze(1)
    zero = ((norms == 0) & used).double()
    norms = torch.where(used & (norms > 0), norms, 0.0)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    quotients = norms @ inverse.mT
    count = used.double().sum(-1, keepdim=True)
    changes = (quotients + quotients.mT) / 2 - count
    # So far a pair with a zero vector has counted -1. It must count 1, and a pair of two zero
    # vectors 0.
    zeros = zero.sum(-1)
    changes += 2 * (zeros.unsqueeze(1) + zeros.unsqueeze(2)) - 3 * (zero @ zero.mT)
    return changes.triu(1)


def _by_group(values: Tensor, batch: BatchTokens, num_groups: int) -> Tensor:
    """Sum values over the sequences of each group, in their order."""
    group = torch.arange(batch.first, batch.first + batch.rows, device=values.device)
    group = group // batch.group_size
    member = group == torch.arange(num_groups, device=values.device).unsqueeze(1)
    return (member.double() @ values.flatten(1)).view(num_groups, *values.shape[1:])
