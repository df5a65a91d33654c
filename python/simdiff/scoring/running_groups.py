"""RunningGroups: the running states of a calibration pass, one for each group of sequences.

A plan depends on all tokens together. Its confidence is computed by making the plan again from
other draws of sequences, which takes the sums of every sequence. Every sequence, or run of
consecutive sequences where there are very many, therefore has a state of its own. The whole is the
sum of these states in the order of the text, bitwise the same in every run.

Each layer stores the row sums of its tokens, 32 bytes per token. One fold at the end of a batch
turns the sums of all layers into the states of all groups. Where blocks of layers are scored, the
layers are the adjacent pairs among all pairs of hidden states, so that no state is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.scoring.block_scores import BlockScores, Matrix
from simdiff.scoring.group_scores import GroupScores
from simdiff.scoring.running_block_groups import RunningBlockGroups
from simdiff_kernels import (
    APART,
    COUNTED,
    LEFT_OUT,
    RunningSummary,
    empty_state,
    fold,
    join_states,
    row_sums,
    summary_of,
)


class Places(TypedDict):
    """The arguments by which `simdiff_kernels.fold` assigns tokens to running states."""

    first_state: int
    offset: int
    tokens_per_state: int


State: TypeAlias = tuple[Tensor, Tensor]
"""`moments` and `counts` of `simdiff_kernels.empty_state`."""


@dataclass
class BatchTokens:
    """The tokens of the current batch that count, and their groups."""

    rows: int
    length: int
    first: int
    """Index of the batch's first sequence in the whole pass."""
    group_size: int
    kinds: Tensor | None
    """Kind of each token, uint8 `(rows, length)` on the host; None if all tokens count."""
    tokens_before: int = 0
    """Number of tokens of the batches before this one, whoever runs them."""
    layers_seen: set[int] = field(default_factory=set)
    """Layers whose row sums have been stored; at the fold it must hold every layer."""
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)
    _read: dict[torch.device, Tensor] = field(default_factory=dict)

    def places(self, tokens_per_row: int) -> Places:
        """The group of each token, for rows of `tokens_per_row` tokens."""
        state, row = divmod(self.first, self.group_size)
        return {
            "first_state": state,
            "offset": row * tokens_per_row,
            "tokens_per_state": self.group_size * tokens_per_row,
        }

    def kinds_on(self, device: torch.device) -> Tensor | None:
        """The kinds on a device; the copy is made once."""
        if self.kinds is None:
            return None
        if device not in self._copies:
            self._copies[device] = self.kinds.to(device, non_blocking=True)
        return self._copies[device]

    def read_on(self, device: torch.device) -> Tensor | None:
        """Mask of the tokens that are read, on a device, made once; None if all are read."""
        kinds = self.kinds_on(device)
        if kinds is not None and device not in self._read:
            self._read[device] = kinds != LEFT_OUT
        return None if kinds is None else self._read[device]

    def by_row(self, states: Tensor) -> Tensor:
        """Reshape states to one row per sequence, also if a model joins all tokens in one row."""
        shape = self.rows, self.length
        if tuple(states.shape[:-1]) == shape:
            return states
        return states.reshape(*shape, states.shape[-1])


class _DeviceLayers:
    """The row sums of a batch and all running states for the layers on one device."""

    def __init__(self, num_layers: int, start: State) -> None:
        self.layers: list[int] = []
        """Layers in the order of their first update, which is the order of the layer axis here."""
        self._most, self._start = num_layers, start
        self._sums: Tensor | None = None
        self._state: State | None = None
        self.leading: dict[int, State] = {}
        """The state of the leading tokens of each batch, by the number of tokens before it."""

    def sums(self, batch: BatchTokens, device: torch.device) -> Tensor:
        """The buffer for the row sums of a batch, `(num_layers, rows, length, 4)`."""
        shape = self._most, batch.rows, batch.length, 4
        words = self._most * batch.rows * batch.length * 4
        if self._sums is None or self._sums.numel() < words:
            self._sums = torch.empty(words, dtype=torch.float64, device=device)
        return self._sums[:words].view(shape)

    def sums_of(self, layer: int, batch: BatchTokens, device: torch.device) -> Tensor:
        """The part of the buffer for the row sums of one layer, `(rows, length, 4)`."""
        if layer not in self.layers:
            self.layers.append(layer)
        return self.sums(batch, device)[self.layers.index(layer)]

    def fold(self, batch: BatchTokens, hidden_size: int, apart: bool, backend: str | None) -> None:
        """Turn the row sums of a batch into the states of its groups."""
        assert self._sums is not None
        device = self._sums.device
        if self._state is None:
            moments, counts = (state[:, self.layers].to(device) for state in self._start)
            self._state = moments.contiguous(), counts.contiguous()
        self._state[1][..., -1] = batch.tokens_before
        fold(
            *self._state,
            self.sums(batch, device)[: len(self.layers)],
            hidden_size,
            batch.kinds_on(device),
            apart=apart,
            backend=backend,
            **batch.places(batch.length),
        )
        if apart:
            self._take_leading(batch.tokens_before)

    def _take_leading(self, key: int) -> None:
        """Keep the last state, of the leading tokens of this batch, apart; the next one is new."""
        assert self._state is not None
        moments, counts = (state[-1:] for state in self._state)
        self.leading[key] = moments[0].clone(), counts[0].clone()
        empty = empty_state(1, len(self.layers), moments.device)
        moments.copy_(empty[0])
        counts.copy_(empty[1])

    def copy_to(self, moments: Tensor, counts: Tensor) -> None:
        """Copy the states to their layers' places in host tensors for all layers."""
        if self._state is not None:
            mine = [state.cpu() for state in self._state]
            moments[:, self.layers], counts[:, self.layers] = mine


class RunningGroups:
    """The running states of a calibration pass; a `LayerSink` for `LayerHooks`.

    There is a state for every group of sequences and one for leading tokens. `begin` tells the
    shape of a batch; `update` then takes the tokens of each layer, and `end` folds them. None of
    them waits for the device.

    Args:
        num_layers: number of decoder layers.
        num_groups: upper limit of the number of groups.
        blocks: also score every block of layers.
        group_size: number of consecutive sequences in a group.
        skip_leading: number of real tokens at the beginning of each sequence that are kept apart.
        backend: backend of simdiff_kernels; None takes the fastest one for the device.
    """

    def __init__(
        self,
        num_layers: int,
        num_groups: int,
        *,
        blocks: bool = True,
        group_size: int = 1,
        skip_leading: int = 0,
        backend: str | None = None,
    ) -> None:
        """Start with no sequences seen."""
        self.num_layers = num_layers
        self.skip_leading = skip_leading
        self.blocks = RunningBlockGroups(self, num_groups, backend) if blocks else None
        self.batch = BatchTokens(0, 0, 0, group_size, None)
        self._group_size, self._backend = group_size, backend
        self._num_groups = num_groups
        self._nonempty = [0] * num_groups
        self._num_sequences = self._num_tokens = 0
        self._has_leading = False
        self._hidden_size = 0
        self._devices: dict[torch.device, _DeviceLayers] = {}
        # What the states on devices begin with, and the leading tokens of batches before them.
        self._start = empty_state(num_groups + (skip_leading > 0), num_layers)
        self._leading: dict[int, State] = {}

    def begin(self, mask: Tensor) -> Tensor:
        """Begin a batch.

        Args:
            mask: `(rows, length)` on the host, nonzero for real tokens.

        Returns:
            Bool mask of the tokens that count: all real tokens but the leading ones.
        """
        first, before = self._num_sequences, self._num_tokens
        counted, leading = self.skip(mask)
        kinds = None
        if not bool(counted.all()):
            kinds = torch.full(mask.shape, LEFT_OUT, dtype=torch.uint8)
            kinds[counted], kinds[leading] = COUNTED, APART
        rows, length = mask.shape
        self.batch = BatchTokens(rows, length, first, self._group_size, kinds, before)
        return counted

    def skip(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch that another process runs, in place of `begin`, updates and `end`.

        Returns:
            Bool masks of the tokens that count and of the leading ones.
        """
        real = mask.bool()
        counted = real & (real.cumsum(1) > self.skip_leading)
        leading = real & ~counted
        self._has_leading |= bool(leading.any())
        for row, nonempty in enumerate(counted.any(1).tolist()):
            self._nonempty[(self._num_sequences + row) // self._group_size] += nonempty
        self._num_sequences += len(mask)
        self._num_tokens += mask.numel()
        return counted, leading

    def update(self, layer: int, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
        """Store the row sums of one layer's tokens; does nothing if blocks are scored.

        Raises:
            SimdiffError: the layer has already run in this batch.
        """
        if self.blocks is not None:
            return
        batch, device = self.batch, before.device
        if layer in batch.layers_seen:
            raise SimdiffError(
                f"every layer must run once for each batch to be scored, got layer {layer} twice"
            )
        batch.layers_seen.add(layer)
        before, after = batch.by_row(before), batch.by_row(after)
        self._hidden_size = before.shape[-1]
        sums = self._on(device).sums_of(layer, batch, device)
        row_sums(before, after, batch.read_on(device), out=sums, backend=self._backend)

    def sums_of_all_layers(self, states: Sequence[Tensor]) -> Tensor:
        """The buffer in which the blocks store the row sums of all layers; see `_DeviceLayers`."""
        device = states[0].device
        self._hidden_size = states[0].shape[-1]
        mine = self._on(device)
        mine.layers = list(range(self.num_layers))
        self.batch.layers_seen.update(mine.layers)
        return mine.sums(self.batch, device)

    def end(self) -> None:
        """Fold the batch into the states of its groups.

        Raises:
            SimdiffError: a layer has not run in this batch; its sums are those of another batch.
        """
        missing = set(range(self.num_layers)) - self.batch.layers_seen
        if missing:
            raise SimdiffError(
                f"every layer must run once for each batch to be scored, got none of layer "
                f"{min(missing)}"
            )
        apart = self.skip_leading > 0
        for layers in self._devices.values():
            layers.fold(self.batch, self._hidden_size, apart, self._backend)

    def finish(self) -> RunningSummary:
        """The statistics of all groups together; more batches may follow.

        Raises:
            NonFiniteError, ValueError: see `RunningScores.finish`.
        """
        moments, counts = self._on_host()
        count = self._num_groups
        return summary_of(*join_states(moments[:count], counts[:count]))

    def finish_blocks(self) -> tuple[BlockScores | None, Matrix | None]:
        """The scores of all blocks and the last-token angles; None if blocks are not scored.

        Raises:
            NonFiniteError, ValueError: see `RunningBlockScores.finish`.
        """
        return (None, None) if self.blocks is None else self.blocks.finish()

    def finish_leading(self) -> RunningSummary | None:
        """The statistics of the leading tokens; None if none are kept apart."""
        if not self._has_leading:
            return None
        parts = self._leading_on_host()
        moments, counts = zip(*(parts[key] for key in sorted(parts)), strict=True)
        return summary_of(*join_states(torch.stack(moments), torch.stack(counts)))

    def group_scores(self) -> list[GroupScores]:
        """The scores of each group of sequences that has a token that counts.

        Raises:
            NonFiniteError, ValueError: see `finish`.
        """
        moments, counts = self._on_host()
        found = []
        for group, nonempty in enumerate(self._nonempty):
            if nonempty:
                blocks, angles = (
                    (None, None) if self.blocks is None else self.blocks.finish_group(group)
                )
                summary = summary_of(moments[group], counts[group])
                first = group * self._group_size
                found.append(GroupScores(first, nonempty, summary, blocks, angles))
        return found

    def part(self, sequences: range) -> dict[str, Any]:
        """What this process adds to the states, for `put`, on the host.

        Args:
            sequences: those that it has run, whole groups of them.
        """
        first = sequences.start // self._group_size
        groups = slice(first, max(first, -(-sequences.stop // self._group_size)))
        moments, counts = self._on_host()
        return {
            "groups": groups,
            "layers": (moments[groups], counts[groups]),
            "leading": self._leading_on_host(),
            "blocks": None if self.blocks is None else self.blocks.part(groups),
        }

    def put(self, parts: Sequence[dict[str, Any]]) -> None:
        """Take the states that all processes have made, each of its own groups, as one's own."""
        self._start = self._on_host()
        for part in parts:
            for ours, theirs in zip(self._start, part["layers"], strict=True):
                ours[part["groups"]] = theirs
            self._leading |= part["leading"]
        self._start[1][..., -1] = self._num_tokens
        self._devices.clear()
        if self.blocks is not None:
            theirs = [(part["groups"], part["blocks"]) for part in parts]
            self.blocks.put(theirs, self._num_tokens, self._num_sequences)

    def _on(self, device: torch.device) -> _DeviceLayers:
        if device not in self._devices:
            self._devices[device] = _DeviceLayers(self.num_layers, self._start)
        return self._devices[device]

    def _on_host(self) -> State:
        moments, counts = (state.clone() for state in self._start)
        for layers in self._devices.values():
            layers.copy_to(moments, counts)
        return moments, counts

    def _leading_on_host(self) -> dict[int, State]:
        """The state of the leading tokens of every batch, of all layers."""
        found = dict(self._leading)
        for layers in self._devices.values():
            for key, state in layers.leading.items():
                if key not in found:
                    empty = empty_state(1, self.num_layers)
                    found[key] = empty[0][0], empty[1][0]
                for ours, theirs in zip(found[key], state, strict=True):
                    ours[layers.layers] = theirs.cpu()
        return found
