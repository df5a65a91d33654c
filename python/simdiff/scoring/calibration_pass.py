"""The calibration pass: run batches through the decoder and score every layer and block."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import Batch, model_inputs, token_mask
from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.progress import silent, track
from simdiff.models.identity import model_identity
from simdiff.models.running import in_evaluation
from simdiff.models.streamed import stream_of
from simdiff.models.structure import decoder_body, find_decoder_layers
from simdiff.models.sweep import Sweep
from simdiff.models.weights import weights_digest
from simdiff.models.windows import check_windows
from simdiff.scoring.group_scores import SequenceScores
from simdiff.scoring.hooks import BlockSink, LayerHooks
from simdiff.scoring.metric_tables import LeadingScores, metric_tables
from simdiff.scoring.running_groups import RunningGroups
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import RunningScores, default_backend

# Maximum number of groups of sequences that keep statistics of their own. Up to this number every
# sequence is a group.
DEFAULT_GROUPS = 128


def score(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    name: str = "",
    calibration: Mapping[str, Any] | None = None,
    backend: str | None = None,
    blocks: bool = True,
    progress: bool = True,
    groups: int = DEFAULT_GROUPS,
    skip_leading: int = 0,
    max_state_bytes: int | None = None,
) -> LayerScores:
    """Run the calibration batches through the decoder and score every layer and block of layers.

    Each batch takes one forward without language-model head and KV cache. Hidden states are freed
    at the end of their batch, or after their layer if no blocks are scored.

    Args:
        model: any causal language model of transformers with recognisable decoder layers.
        batches: token ids `(batch, sequence)`, or mappings with `input_ids` and, where
            sequences are padded on the left or right, `attention_mask`.
        name: name of the model, for the record.
        calibration: identity of the text, for the record (`TextIdentity.to_dict()`).
        backend: backend of simdiff_kernels; None takes the fastest one.
        blocks: also score every run of consecutive layers, and its last-token angles.
        progress: show a progress bar.
        groups: maximum number of groups of consecutive sequences that keep statistics of their own
            for the bootstrap (`LayerScores.sequences`). With `groups` sequences or fewer, every
            sequence is a group.
        skip_leading: number of real tokens at the beginning of each sequence that are left out of
            the scores and kept apart (`LayerScores.leading`), since a massive activation at a BOS
            token dominates means of squares.
        max_state_bytes: limit of the memory for hidden states. Blocks need all L + 1 states of a
            batch at once; a batch whose states take more runs in parts of fewer sequences, down to
            one. None sets no limit.

    Raises:
        SimdiffError: no decoder layers are found, there are no batches, all tokens are masked, or
            no sequence is longer than `skip_leading`.
        simdiff_kernels.NonFiniteError: a hidden state contains NaN or Inf.
    """
    inputs = model_inputs(batches, "score")
    if not inputs:
        raise SimdiffError("score: batches must hold at least one batch, got none")
    num_sequences = sum(len(batch["input_ids"]) for batch in inputs)
    whole = CalibrationPass(
        model,
        num_sequences=num_sequences,
        name=name,
        calibration=calibration,
        backend=backend,
        blocks=blocks,
        groups=groups,
        skip_leading=skip_leading,
        max_state_bytes=max_state_bytes,
    )
    whole.feed(inputs, "score" if progress else None)
    return whole.scores()


class CalibrationPass:
    """A calibration pass in steps: more batches may follow after `scores`.

    Args:
        model, name, calibration, backend, blocks, groups, skip_leading, max_state_bytes: see
            `score`.
        num_sequences: upper limit of the sequences that will be fed; with `groups` it determines
            how many share a group.

    Raises:
        SimdiffError: no decoder layers are found, or groups or skip_leading is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_sequences: int,
        name: str = "",
        calibration: Mapping[str, Any] | None = None,
        backend: str | None = None,
        blocks: bool = True,
        groups: int = DEFAULT_GROUPS,
        skip_leading: int = 0,
        max_state_bytes: int | None = None,
    ) -> None:
        """Find the layers and make empty running scores; nothing runs yet."""
        if max_state_bytes is not None and max_state_bytes < 1:
            raise SimdiffError(f"score: max_state_bytes must be at least 1, got {max_state_bytes}")
        self._most = max_state_bytes if blocks else None
        if groups < 1 or skip_leading < 0:
            raise SimdiffError(
                f"score: groups must be at least 1 and skip_leading at least 0, got {groups} and "
                f"{skip_leading}"
            )
        self._layers = find_decoder_layers(model)
        self._group_size = group_size = -(-num_sequences // groups)
        self._running = RunningGroups(
            len(self._layers),
            -(-num_sequences // group_size),
            blocks=blocks,
            group_size=group_size,
            skip_leading=skip_leading,
            backend=backend,
        )
        self._model, self._ids = model, list[Tensor]()
        self._identity = model_identity(model, name)
        self._calibration = dict(calibration or {})
        if skip_leading:
            self._calibration["skip_leading"] = skip_leading
        stream = stream_of(model)
        parameters = self._layers.modules.parameters()
        device = (next(parameters) if stream is None else stream).device.type
        self._provenance = {"backend": backend or default_backend(device), "device": device}

    def feed(self, batches: Sequence[Batch], description: str | None = None) -> None:
        """Run batches through the decoder; a description shows a bar."""
        inputs = model_inputs(batches, "score")
        check_windows(self._model, [batch["input_ids"] for batch in inputs], "score")
        skip = self._running.skip_leading
        for batch in inputs:
            length = batch["input_ids"].shape[1]
            if skip >= length:
                raise SimdiffError(
                    f"score: skip_leading must be below the length of every sequence, got {skip} "
                    f"for {length} tokens"
                )
        if not any(bool(token_mask(batch).sum(1).gt(skip).any()) for batch in inputs):
            raise SimdiffError(
                "score: attention_mask must leave some token"
                + (f" after the first {skip}, which are skipped" if skip else "")
                + ", got all tokens masked"
            )
        inputs = [part for batch in inputs for part in self._parts(batch)]
        self._agree(inputs)
        first = self._num_sequences
        self._ids += [batch["input_ids"] for batch in inputs]
        mine = shared_batches(list(map(_num_rows, inputs)), first, self._group_size)
        if ranks.size() == 1:
            self._run(inputs, mine, first, description)
            return
        self._running.put(
            ranks.all_of(lambda: self._running.part(self._run(inputs, mine, first, description)))
        )

    def _run(
        self, inputs: Sequence[dict[str, Tensor]], mine: range, first: int, description: str | None
    ) -> range:
        """Run this process's batches and pass by those of others; the sequences that it has run."""
        running, batches = self._running, inputs[mine.start : mine.stop]
        for batch in inputs[: mine.start]:
            running.skip(token_mask(batch))
        self._feed(batches, description)
        for batch in inputs[mine.stop :]:
            running.skip(token_mask(batch))
        first += sum(map(_num_rows, inputs[: mine.start]))
        return range(first, first + sum(map(_num_rows, batches)))

    def _feed(self, batches: Sequence[dict[str, Tensor]], description: str | None) -> None:
        if not batches:
            return
        if stream_of(self._model) is not None:
            with contextlib.nullcontext() if description else silent():
                return feed_streamed(self._model, self._running, batches, description or "score")
        feed_forward(
            self._model,
            self._layers.modules,
            self._running,
            batches if description is None else track(batches, description),
            self._running.blocks,
        )

    def _agree(self, inputs: Sequence[dict[str, Tensor]]) -> None:
        """Refuse processes that would score something else.

        Raises:
            SimdiffError: names what differs.
        """
        if ranks.size() == 1:
            return
        tokens = hashlib.sha256()
        for batch in inputs:
            for name in sorted(batch):
                tokens.update(f"{name} {tuple(batch[name].shape)}".encode())
                tokens.update(batch[name].cpu().numpy().tobytes())
        model = {key: value for key, value in self._identity.items() if key != "name"}
        ranks.agree(
            "what is scored",
            {
                "model": {**model, "weights": weights_digest(self._model)},
                "tokens": tokens.hexdigest(),
                "options": {**self._provenance, "group_size": self._group_size},
            },
        )

    @property
    def _num_sequences(self) -> int:
        return sum(map(len, self._ids))

    def _parts(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Divide a batch into parts whose hidden states fit into `max_state_bytes`."""
        rows, length = batch["input_ids"].shape
        embedding = self._model.get_input_embeddings().weight
        states = len(self._layers) + 1
        row_bytes = states * length * embedding.shape[1] * embedding.element_size()
        most = rows if self._most is None else max(1, self._most // row_bytes)
        pieces = {name: tensor.split(most) for name, tensor in batch.items()}
        return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]

    def scores(self, calibration: Mapping[str, Any] | None = None) -> LayerScores:
        """The scores of all batches that were fed so far.

        Args:
            calibration: identity of the text, if its amount was not known at the beginning.

        Raises:
            simdiff_kernels.NonFiniteError: a hidden state contains NaN or Inf.
        """
        return scores_of(
            self._running,
            self._ids,
            model=self._identity,
            calibration=self._calibration | dict(calibration or {}),
            provenance=self._provenance,
        )


def scores_of(
    running: RunningGroups, ids: Sequence[Tensor], *, sequences: bool = True, **record: Any
) -> LayerScores:
    """The scores of all tokens that running states have seen.

    Args:
        running: the states.
        ids: token ids `(batch, sequence)` of each batch.
        sequences: whether tokens are in rows of sequences: then they are kept apart, and have last
            tokens.
        record: `model`, `calibration` and `provenance`, for the record.

    Raises:
        simdiff_kernels.NonFiniteError: a hidden state contains NaN or Inf.
    """
    summary = running.finish()
    apart = SequenceScores.from_groups(running.group_scores()) if sequences else None
    blocks, angles = running.finish_blocks()
    leading = running.finish_leading()
    return LayerScores(
        metrics=metric_tables(summary, ids, apart),
        blocks=blocks,
        last_token_angles=angles if sequences else None,
        num_tokens=int(summary.num_tokens[0]),
        sequences=apart,
        leading=None
        if leading is None
        else LeadingScores(
            running.skip_leading, int(leading.num_tokens[0]), metric_tables(leading, ids)
        ),
        **record,
    )


def _num_rows(batch: Mapping[str, Tensor]) -> int:
    return len(batch["input_ids"])


def shared_batches(rows: Sequence[int], first: int, group_size: int) -> range:
    """The batches that this process runs: whole groups, so that no state is made by two processes.

    Args:
        rows: number of sequences in each batch.
        first: number of sequences before them.
        group_size: number of consecutive sequences in a group.
    """
    ends, seen = [], first
    for index, count in enumerate(rows, 1):
        seen += count
        if seen % group_size == 0 or index == len(rows):
            ends.append(index)
    runs = ranks.part(len(ends))
    borders = [0, *ends]
    return range(borders[runs.start], borders[runs.stop])


@in_evaluation
@torch.no_grad()
def feed_forward(
    model: PreTrainedModel,
    layers: torch.nn.ModuleList,
    running: RunningScores | RunningGroups,
    inputs: Iterable[dict[str, Tensor]],
    blocks: BlockSink | None = None,
) -> None:
    """Run batches of `model_inputs` through the decoder, its layers feeding the scores."""
    body = decoder_body(model)
    device = model.get_input_embeddings().weight.device
    with LayerHooks(layers, running, blocks) as hooks:
        for batch in inputs:
            mask = token_mask(batch)
            counted = running.begin(mask) if isinstance(running, RunningGroups) else mask
            hooks.token_shape = tuple(mask.shape)
            # On the device once, not per layer.
            hooks.attention_mask = None if bool(counted.all()) else counted.to(device)
            body(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
            if isinstance(running, RunningGroups):
                running.end()


@torch.no_grad()
def feed_streamed(
    model: PreTrainedModel, running: RunningGroups, inputs: Sequence[dict[str, Tensor]], name: str
) -> None:
    """Run batches through the layers of a streamed model, one layer after the other, and score.

    The states of a batch reach the scores in the order of `feed_forward`, so these are the same to
    the last bit.

    Args:
        model: see `simdiff.models.streamed`.
        running: the scores.
        inputs: batches of `model_inputs`.
        name: of the pass.
    """
    sweep = Sweep(model, inputs, purpose=name, keep=True)
    hooks = LayerHooks(find_decoder_layers(model).modules, running, running.blocks)
    with sweep.finished():
        for index, batch in enumerate(track(inputs, f"{name}, all blocks")):
            mask = token_mask(batch)
            counted = running.begin(mask)
            states = sweep.all_states(index)
            hooks.token_shape = tuple(mask.shape)
            counts_all = bool(counted.all())
            hooks.attention_mask = None if counts_all else counted.to(states[0].device)
            for layer in range(running.num_layers):
                hooks.measure(layer, states[layer], states[layer + 1])
            running.end()
