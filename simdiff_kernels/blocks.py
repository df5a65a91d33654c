"""RunningBlockScores: what every run of consecutive layers did to the tokens, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import (
    block_scratch_words,
    num_block_parts,
    resolve_backend,
    usable_backends,
)
from .metrics import ALL_TOKENS, BLOCK_METRICS
from .ops import (
    OPERATORS,
    as_kinds,
    as_mask,
    as_rows,
    check_hidden_states,
    has_implementation,
)
from .running_base import RunningBase, grown
from .running_states import (
    NUM_BLOCK_COUNTS,
    NUM_BLOCK_MOMENTS,
    empty_block_state,
    join_block_states,
)
from .summaries import BlockSummary, block_summary_of


class BlockScratch:
    """Memory that a GPU needs within an update of all blocks of layers: at most some 320 MB.

    It grows with the largest batch and holds nothing between updates. Updates that share it must
    follow one another on one stream.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self._words: list[Tensor] = []

    def words(self, backend: str, states: Sequence[Tensor], absolute: bool) -> Tensor | None:
        """int64 memory for an update by these hidden states, or None where the backend needs none.

        Args:
            backend: a name, not None.
            states: h_0 ... h_L, the hidden states of the update.
            absolute: whether the absolute difference is measured.
        """
        if backend != "cuda":
            return None
        count = block_scratch_words(backend, states[0], len(states), absolute)
        return grown(self._words, count, torch.int64, states[0].device)


class RunningBlockScores(RunningBase):
    """Running reductions of `BLOCK_METRICS` over every pair i < j of the hidden states h_0 ... h_L.

    The block of layers i ... j - 1 turns x = h_i into y = h_j. Of each token and block, with
    d = y - x: 1 - cos(x, y), sum d^2, sum |d| / hidden_size, ||d|| / ||x||, arccos(cos(x, y)) / pi.

    One state of `11 (L + 1)^2 + 3` numbers however many tokens are seen (eight of them on a GPU):
    sums, sums of squares and a maximum, in float64. `update` never waits for the device and its
    result is bitwise the same in every run (on the CPU for any number of threads); states of
    different batches, devices or processes are joined by `merge`. A token with a NaN or Inf in any
    state is left out of all pairs and counted.

    Args:
        num_layers: L; an update takes L + 1 states.
        backend: "reference", "cpu" or "cuda"; None takes the fastest one for the device.
        absolute_difference: also measure the absolute difference; on the CPU an update then takes a
            quarter to a third longer.

    Source: SimDiff, arXiv 2604.19520, Eq. 1-5, for blocks as in Gromov et al., arXiv 2403.17887,
    Section 3; the angular distance is their Eq. 7.
    """

    _METRICS = BLOCK_METRICS
    _VERSIONS = range(1, 3)  # 1 always held the absolute difference, and had no parts

    def __init__(
        self, num_layers: int, *, backend: str | None = None, absolute_difference: bool = False
    ) -> None:
        """Start with no tokens seen."""
        super().__init__(num_layers, backend)
        self.absolute_difference = absolute_difference
        # The parts of the state live where the first update's states do; before it, nowhere. The
        # tokens seen are those of the first part: every part counts all of them.
        self._moments: Tensor | None = None
        self._counts: Tensor | None = None
        self._scratch = BlockScratch()

    def empty_like(self) -> RunningBlockScores:
        """Another one of the same kind, empty, that shares what a GPU needs within an update.

        Updates of all that share it must follow one another on one stream.
        """
        other = RunningBlockScores(
            self.num_layers, backend=self.backend, absolute_difference=self.absolute_difference
        )
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
        _check_states(function, states, self.num_layers)
        first = states[0]
        mask = as_mask(function, mask, first, "states[0]")
        backend = _resolve(self.backend, first.device)
        rows = [as_rows(state) for state in states]
        num_tokens, parts = first.shape[:-1].numel(), num_block_parts(backend)
        scratch = self._scratch.words(backend, rows, self.absolute_difference)
        moments, counts = self._state(first.device, parts)
        OPERATORS["accumulate_blocks"][backend](
            moments,
            counts,
            rows,
            None if mask is None else as_kinds(mask),
            tokens_per_state=ALL_TOKENS if parts == 1 else -(-num_tokens // parts),
            absolute=self.absolute_difference,
            scratch=scratch,
        )

    def merge(self, other: RunningBlockScores) -> None:
        """Add the tokens that `other` saw.

        Counts and maxima are exact; sums are added in float64.

        Raises:
            ValueError: a different number of layers, or only one of the two measures the absolute
                difference.
        """
        self._check_num_layers("merge: other", other.num_layers)
        self._check_option("merge: other", "absolute_difference", other.absolute_difference)
        if other._moments is None or other._counts is None:
            return
        device = other._moments.device if self._moments is None else self._moments.device
        parts = len(other._moments)
        moments, counts = self._state(device, parts)
        theirs = other._moments.to(device)
        moments[:parts, :-1] += theirs[:, :-1]
        moments[:parts, -1] = torch.maximum(moments[:parts, -1], theirs[:, -1])
        counts[:parts] += other._counts.to(device)

    def finish(self, *, allow_nonfinite: bool = False) -> BlockSummary:
        """Bring the state to the host and summarise it; more updates may follow.

        Args:
            allow_nonfinite: summarise the finite tokens even if others held NaN or Inf.

        Raises:
            NonFiniteError: some token held NaN or Inf.
            ValueError: no token to average.
        """
        return block_summary_of(
            *self._on_host(), self.absolute_difference, allow_nonfinite=allow_nonfinite
        )

    def state_dict(self) -> dict[str, Any]:
        """The whole state as CPU tensors and plain values, for `torch.save` or another process.

        `moments` is `(parts, 2 * num_block_metrics + 1, L + 1, L + 1)`: parts are kept apart so
        that an interrupted pass ends with the same bits.
        """
        return self._saved(*self._parts_on_host()) | {
            "absolute_difference": self.absolute_difference
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one from `state_dict`; it moves to a device with the next update.

        Raises:
            ValueError: of another version, other metrics, another number of layers, or with the
                absolute difference and this one without, or the other way round.
        """
        moments, counts = self._read(state)
        what = "load_state_dict: state"
        self._check_option(what, "absolute_difference", state.get("absolute_difference", True))
        if moments.dim() == 3:  # version 1 had no parts
            moments, counts = moments[None], counts[None]
        side = moments.shape[-1]
        shapes = (len(moments), NUM_BLOCK_MOMENTS, side, side), (len(moments), NUM_BLOCK_COUNTS)
        if (tuple(moments.shape), tuple(counts.shape)) != shapes:
            raise ValueError(
                f"RunningBlockScores.{what} must have moments {shapes[0]} and counts {shapes[1]}, "
                f"got {tuple(moments.shape)} and {tuple(counts.shape)}"
            )
        self._check_num_layers(what, side - 1)
        self._moments, self._counts = moments, counts

    def _state(self, device: torch.device, parts: int) -> tuple[Tensor, Tensor]:
        """The state on a device, of at least so many parts."""
        moments, counts = self._moments, self._counts
        if moments is None or counts is None:
            moments, counts = empty_block_state(self.num_layers, device, parts)
        elif moments.device != device or len(moments) < parts:
            moments, counts = moments.to(device), counts.to(device)
            more = empty_block_state(self.num_layers, device, max(0, parts - len(moments)))
            moments, counts = torch.cat([moments, more[0]]), torch.cat([counts, more[1]])
        self._moments, self._counts = moments, counts
        return moments, counts

    def _parts_on_host(self) -> tuple[Tensor, Tensor]:
        """A copy of the state as it is."""
        if self._moments is None or self._counts is None:
            return empty_block_state(self.num_layers, torch.device("cpu"))
        return self._moments.to("cpu", copy=True), self._counts.to("cpu", copy=True)

    def _on_host(self) -> tuple[Tensor, Tensor]:
        """The parts joined, in order."""
        return join_block_states(*self._parts_on_host())


def accumulate_blocks(
    moments: Tensor,
    counts: Tensor,
    states: Sequence[Tensor],
    *,
    kinds: Tensor | None = None,
    first_state: int = 0,
    offset: int = 0,
    tokens_per_state: int = ALL_TOKENS,
    absolute_difference: bool = False,
    sums: Tensor | None = None,
    scratch: BlockScratch | None = None,
    backend: str | None = None,
) -> None:
    """Fold the tokens of one batch into many running states of all blocks, in one call.

    What `RunningBlockScores` keeps once is kept here for each group of tokens: token t of the
    batch, counted in row-major order, belongs to running state
    `first_state + (offset + t) // tokens_per_state`, and to none where there is no such state.

    Args:
        moments, counts: of `empty_block_state`, changed in place; `RunningBlockScores` describes
            what they hold, `reference.accumulate_blocks` how.
        states: h_0 ... h_L, as in `RunningBlockScores.update`.
        kinds: uint8 `(...)`, contiguous: `LEFT_OUT` (neither read nor counted), `COUNTED`, or
            `APART` (only its row sums are wanted). None counts all.
        first_state, offset, tokens_per_state: see above.
        absolute_difference: also measure the absolute difference, whose moments else stay as they
            are.
        sums: float64 `(L, ..., 4)`, contiguous: receives sum x^2, sum y^2, sum d^2 and sum |d| of
            every token and layer, d = y - x, and zeros for tokens that are `LEFT_OUT`.
        scratch: kept by the caller from call to call, so that a GPU need not allocate.
        backend: "reference", "cpu" or "cuda"; None takes the fastest one for the device.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes, dtypes or devices that do not fit; nothing has been changed.
    """
    function = "accumulate_blocks"
    _check_states(function, states, moments.shape[-1] - 1)
    first, num_states = states[0], len(states)
    if offset < 0 or tokens_per_state < 1:
        raise ValueError(
            f"{function}: offset must be at least 0 and tokens_per_state at least 1, "
            f"got {offset} and {tokens_per_state}"
        )
    num_running, tokens = len(moments), tuple(first.shape[:-1])
    square = (num_running, NUM_BLOCK_MOMENTS, num_states, num_states)
    _check_buffer(function, "moments", moments, square, torch.float64, first)
    _check_buffer(function, "counts", counts, (num_running, NUM_BLOCK_COUNTS), torch.int64, first)
    if kinds is not None:
        _check_buffer(function, "kinds", kinds, tokens, torch.uint8, first)
    if sums is not None:
        _check_buffer(function, "sums", sums, (num_states - 1, *tokens, 4), torch.float64, first)
    name = _resolve(backend, first.device)
    rows = [as_rows(state) for state in states]
    shape = rows[0].shape[:2]
    words = (scratch or BlockScratch()).words(name, rows, absolute_difference)
    OPERATORS["accumulate_blocks"][name](
        moments,
        counts,
        rows,
        None if kinds is None else kinds.view(shape),
        first_state,
        offset,
        tokens_per_state,
        absolute_difference,
        None if sums is None else sums.view(num_states - 1, *shape, 4),
        words,
    )


def _check_states(function: str, states: Sequence[Tensor], num_layers: int) -> None:
    if len(states) != num_layers + 1:
        raise ValueError(
            f"{function}: states must be {num_layers + 1} tensors, one before the first "
            f"and one after each of {num_layers} layers, got {len(states)}"
        )
    for index, state in enumerate(states):
        check_hidden_states(function, states[0], state, names=("states[0]", f"states[{index}]"))


def _check_buffer(
    function: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    states: Tensor,
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{function}: {name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{function}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous() or tensor.device != states.device:
        raise ValueError(
            f"{function}: {name} must be contiguous and on {states.device} like states[0]"
        )


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
