"""RunningGroups: the running states of a calibration pass, one for each group of sequences.

A plan depends on all tokens together, so how sure it is can only be told by computing it again from
other draws of sequences; that takes the sums of each. Running states are small and merge, so every
sequence, or run of consecutive sequences where there are very many, has its own, and the whole is
their sum in the order of the text: bitwise the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from simdiff.block_scores import BlockScores, Matrix, RunningBlocks, norm_changes
from simdiff.last_token import LastTokenAngles, RunningLastTokenAngles, last_token_angles
from simdiff.sequence_scores import GroupScores
from simdiff_kernels import RunningScores, RunningSummary


@dataclass
class _Group:
    """States of consecutive sequences."""

    first: int
    """Its first sequence, counted over the whole pass."""
    scores: RunningScores
    blocks: RunningBlocks | None
    angles: RunningLastTokenAngles | None
    nonempty: int = 0
    """Sequences with a token that counts."""


@dataclass
class _Batch:
    """The batch about to run."""

    rows: int
    length: int
    spans: list[tuple[_Group, slice]] = field(default_factory=list)
    """Which rows go to which group."""
    leading: Tensor | None = None
    """`(rows, n)`, True for the leading tokens, all of which lie at the first n positions."""


class RunningGroups:
    """What `LayerHooks` feeds in a calibration pass: of every group, and of leading tokens apart.

    `begin` tells the shape of a batch; `update` then takes the place of `RunningScores.update` for
    every layer. Like that it never waits for the device.

    Args:
        num_layers: of the model.
        blocks: also of every block of layers.
        group_size: consecutive sequences in a group.
        skip_leading: so many real tokens at the beginning of each sequence are kept apart.
        backend: of simdiff_kernels; None takes the fastest one for the device.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        blocks: bool = True,
        group_size: int = 1,
        skip_leading: int = 0,
        backend: str | None = None,
    ) -> None:
        """Start with no sequences seen."""
        self.num_layers = num_layers
        self.skip_leading = skip_leading
        self.blocks = _GroupedBlocks(self) if blocks else None
        self.last_tokens = _GroupedLastTokens(self) if blocks else None
        self.batch = _Batch(0, 0)
        self.leading_shapes: list[tuple[int, int]] = []
        """Rows and positions of the leading tokens of each batch, as `update` counts them."""
        self._group_size = group_size
        self._groups: list[_Group] = []
        self._num_sequences = 0
        self._like = RunningScores(num_layers, backend=backend)
        self._blocks_like = RunningBlocks(num_layers, backend=backend) if blocks else None
        self._leading = self._like.sibling()

    def begin(self, mask: Tensor) -> Tensor:
        """Prepare for a batch.

        Args:
            mask: `(rows, length)` on the host, nonzero for real tokens.

        Returns:
            Which tokens count, bool: all real ones but the leading ones of each sequence.
        """
        real = mask.bool()
        counted = real & (real.cumsum(1) > self.skip_leading)
        self.batch = _Batch(*mask.shape)
        nonempty = counted.any(1).tolist()
        for row in range(len(mask)):
            group = self._group_of(self._num_sequences + row)
            group.nonempty += nonempty[row]
            spans = self.batch.spans
            if spans and spans[-1][0] is group:
                spans[-1] = group, slice(spans[-1][1].start, row + 1)
            else:
                spans.append((group, slice(row, row + 1)))
        self._num_sequences += len(mask)
        leading = real & ~counted
        if bool(leading.any()):
            stop = int(leading.any(0).nonzero().max()) + 1
            self.batch.leading = leading[:, :stop]
            self.leading_shapes.append((len(mask), stop))
        return counted

    def update(self, layer: int, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of the batch to the state of one layer; see `RunningScores.update`."""
        before, after, mask = self._by_row(before), self._by_row(after), self._mask_by_row(mask)
        for group, rows in self.batch.spans:
            part = None if mask is None else mask[rows]
            group.scores.update(layer, before[rows], after[rows], part)
        leading = self.batch.leading
        if leading is not None:
            if leading.device != before.device:
                leading = self.batch.leading = leading.to(before.device, non_blocking=True)
            stop = leading.shape[1]
            self._leading.update(layer, before[:, :stop], after[:, :stop], leading)

    def finish(self) -> RunningSummary:
        """The whole, group after group; more batches may follow.

        Raises:
            NonFiniteError, ValueError: see `RunningScores.finish`.
        """
        total = self._like.sibling()
        for group in self._groups:
            total.merge(group.scores)
        return total.finish()

    def finish_blocks(self) -> tuple[BlockScores | None, Matrix | None]:
        """The same for the blocks, and the angles at last tokens; None where they are not scored.

        Raises:
            NonFiniteError, ValueError: see `RunningBlocks.finish`.
        """
        if self._blocks_like is None:
            return None, None
        blocks, angles = self._blocks_like.empty_like(), RunningLastTokenAngles(self.num_layers)
        for group in self._groups:
            assert group.blocks is not None
            assert group.angles is not None
            blocks.merge(group.blocks)
            angles.merge(group.angles)
        return blocks.finish(), angles.finish()

    def finish_leading(self) -> RunningSummary | None:
        """The leading tokens apart; None where none are kept."""
        return self._leading.finish() if self.leading_shapes else None

    def group_scores(self) -> list[GroupScores]:
        """What each group of sequences alone gave; those without a token that counts are left out.

        Raises:
            NonFiniteError, ValueError: as `finish`.
        """
        return [
            GroupScores(
                first=group.first,
                num_sequences=group.nonempty,
                summary=group.scores.finish(),
                blocks=None if group.blocks is None else group.blocks.finish(),
                last_token_angles=None if group.angles is None else group.angles.finish(),
            )
            for group in self._groups
            if group.nonempty
        ]

    def _group_of(self, sequence: int) -> _Group:
        """Made before the forward of its first batch: what is made within it pins the heap."""
        index = sequence // self._group_size
        if index == len(self._groups):
            blocks = self._blocks_like
            self._groups.append(
                _Group(
                    sequence,
                    self._like.sibling(),
                    None if blocks is None else blocks.empty_like(),
                    None if blocks is None else RunningLastTokenAngles(self.num_layers),
                )
            )
        return self._groups[index]

    def _by_row(self, states: Tensor) -> Tensor:
        """One row for each sequence, also where a model lays tokens out in one line."""
        shape = self.batch.rows, self.batch.length
        if tuple(states.shape[:-1]) == shape:
            return states
        return states.reshape(*shape, states.shape[-1])

    def _mask_by_row(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.reshape(self.batch.rows, self.batch.length)


class _GroupedBlocks:
    """Takes the place of `RunningBlocks` in `LayerHooks`."""

    def __init__(self, groups: RunningGroups) -> None:
        self.num_layers = groups.num_layers
        self._groups = groups

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        groups = self._groups
        states = [groups._by_row(state) for state in states]
        mask = groups._mask_by_row(mask)
        changes = norm_changes(states, mask, groups.batch.rows)  # once, not for every sequence
        for group, rows in groups.batch.spans:
            assert group.blocks is not None
            part = None if mask is None else mask[rows]
            own = type(changes)(*(of_rows[rows] for of_rows in changes))
            group.blocks.update([state[rows] for state in states], part, own)


class _GroupedLastTokens:
    """Takes the place of `RunningLastTokenAngles` in `LayerHooks`."""

    def __init__(self, groups: RunningGroups) -> None:
        self._groups = groups

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        groups = self._groups
        states = [groups._by_row(state) for state in states]
        found = last_token_angles(states, groups._mask_by_row(mask))
        for group, rows in groups.batch.spans:
            assert group.angles is not None
            group.angles.add(LastTokenAngles(*(of_rows[rows] for of_rows in found)))
