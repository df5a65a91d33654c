"""LayerScores: what every layer did to the calibration tokens; the calibration pass makes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.block_scores import (
    OPTIONAL_SCORES,
    BlockScores,
    Matrix,
    matrix_from_rows,
    matrix_to_rows,
)
from simdiff.errors import SimdiffError
from simdiff.files import header, read_json, write_json
from simdiff.hooks import BlocksTaker, LayerHooks
from simdiff.metric_tables import LeadingScores, MetricTable, TokenLocation, metric_tables
from simdiff.models import decoder_body, find_decoder_layers, model_identity
from simdiff.progress import track
from simdiff.running_groups import RunningGroups
from simdiff.sequence_scores import SequenceScores
from simdiff_kernels import METRICS, RunningScores, default_backend

__all__ = ["CalibrationPass", "LayerScores", "LeadingScores", "MetricTable", "TokenLocation",
           "feed_forward", "score"]  # fmt: skip

SCHEMA = "simdiff.scores"
# 2 added the blocks; 3 their angular distance, sequences and leading tokens apart. Earlier files
# are read without them. Since 4 the absolute difference of blocks may be lacking.
SCHEMA_VERSION = 4

# So many sequences are kept apart, each as a group of its own; of more, a few share a group.
DEFAULT_GROUPS = 128

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerScores:
    """The table from which every criterion is computed: `metrics[name].mean[layer]`.

    The names are those of `simdiff_kernels.METRICS`. Layers are counted from 0.
    """

    metrics: dict[str, MetricTable]
    num_tokens: int
    """Tokens averaged, the same for every layer."""
    model: dict[str, Any]
    calibration: dict[str, Any]
    provenance: dict[str, Any]
    blocks: BlockScores | None = None
    """Of every run of consecutive layers; None where the pass did not score them."""
    last_token_angles: Matrix | None = None
    """Of every run of consecutive layers, [start][stop]: see `RunningLastTokenAngles`."""
    sublayers: Mapping[str, Any] | None = None
    """Of attention and MLP sub-layers, as in the file: see `SublayerScores`; None without them."""
    sequences: SequenceScores | None = None
    """The same of every group of sequences alone; None in files of earlier versions."""
    leading: LeadingScores | None = None
    """The first tokens of every sequence, where the pass kept them apart."""
    stability: dict[str, Any] | None = None
    """How the amount of text was found, see `simdiff.stability`; None where it was given."""

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.metrics[METRICS[0]].mean)

    def save(self, path: str | Path) -> None:
        """Write scores.json."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of scores.json."""
        return {
            **header(SCHEMA, SCHEMA_VERSION),
            "model": self.model,
            "calibration": self.calibration,
            **self.provenance,
            "num_layers": self.num_layers,
            "num_tokens": self.num_tokens,
            "metrics": {name: table.to_dict() for name, table in self.metrics.items()},
            "blocks": None if self.blocks is None else self.blocks.to_dict(),
            "last_token_angles": None
            if self.last_token_angles is None
            else matrix_to_rows(self.last_token_angles),
            **({} if self.sublayers is None else {"sublayers": dict(self.sublayers)}),
            "sequences": None if self.sequences is None else self.sequences.to_dict(),
            "leading": None if self.leading is None else self.leading.to_dict(),
            "stability": self.stability,
        }

    @classmethod
    def load(cls, path: str | Path) -> LayerScores:
        """Read scores.json.

        Raises:
            SimdiffError: missing, corrupt, incomplete, or written by a newer version.
        """
        content = read_json(path, SCHEMA, SCHEMA_VERSION)
        try:
            num_layers = content["num_layers"]
            metrics = {
                name: MetricTable.from_dict(content["metrics"][name], num_layers)
                for name in METRICS
            }
            version = content["schema_version"]
            blocks = content["blocks"] if version > 1 else None
            if blocks is not None and version < 3:
                blocks = dict.fromkeys(OPTIONAL_SCORES) | dict(blocks)
            angles = content.get("last_token_angles")
            sequences, leading = content.get("sequences"), content.get("leading")
            stability = content.get("stability")
            scores = cls(
                metrics=metrics,
                blocks=None if blocks is None else BlockScores.from_dict(blocks, num_layers),
                last_token_angles=None
                if angles is None
                else matrix_from_rows("last_token_angles", angles, num_layers),
                sublayers=content.get("sublayers"),
                num_tokens=int(content["num_tokens"]),
                model=dict(content["model"]),
                calibration=dict(content["calibration"]),
                provenance={key: content[key] for key in ("backend", "device")},
                sequences=None
                if sequences is None
                else SequenceScores.from_dict(sequences, num_layers),
                leading=None if leading is None else LeadingScores.from_dict(leading, num_layers),
                stability=None if stability is None else {**stability, "note": stability["note"]},
            )
            if scores.sequences and sum(scores.sequences.num_tokens) != scores.num_tokens:
                raise ValueError(f"the sequences must have {scores.num_tokens} tokens together")
            return scores
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must hold finite means and maxima of {', '.join(METRICS)} for every "
                f"layer, but is damaged: {type(error).__name__}: {error}"
            ) from None


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

    One forward per batch without language-model head and without KV cache; no hidden state
    outlives its batch, nor its layer where no blocks are scored.

    Args:
        model: any causal language model of transformers with recognisable decoder layers.
        batches: token ids `(batch, sequence)`, or mappings with `input_ids` and, where
            sequences are padded on the left or right, `attention_mask`.
        name: of the model, for the record.
        calibration: what is known of the text, for the record (`TextIdentity.to_dict()`).
        backend: of simdiff_kernels; None takes the fastest one.
        blocks: also score every run of consecutive layers, at the last tokens too.
        progress: show a bar.
        groups: at most so many groups of consecutive sequences are kept apart
            (`LayerScores.sequences`); of no more sequences than that, each is a group.
        skip_leading: the first so many real tokens of each sequence are left out, and kept apart
            (`LayerScores.leading`): a massive activation at a BOS token dominates means of squares.
        max_state_bytes: blocks need all L + 1 hidden states of a batch at once; a batch whose
            states take more is run in parts of fewer sequences, down to one. None: no limit.

    Raises:
        SimdiffError: no decoder layers found, no batches, all tokens masked, or sequences no longer
            than `skip_leading`.
        simdiff_kernels.NonFiniteError: a hidden state held NaN or Inf.
    """
    inputs = [_as_inputs(batch) for batch in batches]
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
    """A pass that can be looked at on the way: more batches may follow after `scores`.

    Args:
        model, name, calibration, backend, blocks, groups, skip_leading, max_state_bytes: see
            `score`.
        num_sequences: at most so many will be fed; with `groups`, how many share a group.

    Raises:
        SimdiffError: no decoder layers found; groups or skip_leading out of range.
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
        """Prepare; nothing runs yet."""
        if max_state_bytes is not None and max_state_bytes < 1:
            raise SimdiffError(f"score: max_state_bytes must be at least 1, got {max_state_bytes}")
        self._most = max_state_bytes if blocks else None
        if groups < 1 or skip_leading < 0:
            raise SimdiffError(
                f"score: groups must be at least 1 and skip_leading at least 0, got {groups} and "
                f"{skip_leading}"
            )
        self._layers = find_decoder_layers(model)
        group_size = -(-num_sequences // groups)
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
        device = next(self._layers.modules.parameters()).device.type
        self._provenance = {"backend": backend or default_backend(device), "device": device}

    def feed(self, batches: Sequence[Batch], description: str | None = None) -> None:
        """Run batches through the decoder; a description shows a bar."""
        inputs = [_as_inputs(batch) for batch in batches]
        skip = self._running.skip_leading
        for batch in inputs:
            length = batch["input_ids"].shape[1]
            if skip >= length:
                raise SimdiffError(
                    f"score: skip_leading must be below the length of every sequence, got {skip} "
                    f"for {length} tokens"
                )
        if not any(bool((batch["attention_mask"] != 0).sum(1).gt(skip).any()) for batch in inputs):
            raise SimdiffError(
                "score: attention_mask must leave some token"
                + (f" after the first {skip}, which are skipped" if skip else "")
                + ", got all tokens masked"
            )
        inputs = [part for batch in inputs for part in self._parts(batch)]
        self._ids += [batch["input_ids"] for batch in inputs]
        feed_forward(
            self._model,
            self._layers.modules,
            self._running,
            inputs if description is None else track(inputs, description),
            self._running.blocks,
        )

    def _parts(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A batch, or parts of it whose hidden states take no more memory than allowed."""
        rows, length = batch["input_ids"].shape
        embedding = self._model.get_input_embeddings().weight
        states = len(self._layers) + 1
        row_bytes = states * length * embedding.shape[1] * embedding.element_size()
        most = rows if self._most is None else max(1, self._most // row_bytes)
        pieces = {name: tensor.split(most) for name, tensor in batch.items()}
        return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]

    def scores(self, calibration: Mapping[str, Any] | None = None) -> LayerScores:
        """The table of all that was fed.

        Args:
            calibration: what is known of the text now, where the amount was open at the beginning.

        Raises:
            simdiff_kernels.NonFiniteError: a hidden state held NaN or Inf.
        """
        running, ids = self._running, self._ids
        summary = running.finish()
        sequences = SequenceScores.of(running.group_scores())
        blocks, angles = running.finish_blocks()
        leading = running.finish_leading()
        return LayerScores(
            metrics=metric_tables(summary, ids, sequences),
            blocks=blocks,
            last_token_angles=angles,
            num_tokens=int(summary.num_tokens[0]),
            model=self._identity,
            calibration=self._calibration | dict(calibration or {}),
            provenance=self._provenance,
            sequences=sequences,
            leading=None
            if leading is None
            else LeadingScores(
                running.skip_leading,
                int(leading.num_tokens[0]),
                metric_tables(leading, ids),
            ),
        )


@torch.no_grad()
def feed_forward(
    model: PreTrainedModel,
    layers: torch.nn.ModuleList,
    running: RunningScores | RunningGroups,
    inputs: Iterable[dict[str, Tensor]],
    blocks: BlocksTaker | None = None,
) -> None:
    """The calibration pass: every batch through the decoder, its layers feeding the scores."""
    body = decoder_body(model)
    device = model.get_input_embeddings().weight.device
    with LayerHooks(layers, running, blocks) as hooks:
        for batch in inputs:
            mask = batch["attention_mask"]
            padded = not bool(mask.all())
            counted = running.begin(mask) if isinstance(running, RunningGroups) else mask.bool()
            keywords = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
            hooks.attention_mask = None
            hooks.token_shape = tuple(batch["input_ids"].shape)
            if not bool(counted.all()):
                hooks.attention_mask = counted.to(device)  # once, not per layer
            if padded:
                keywords["attention_mask"] = mask.to(device)
                if not bool(mask[:, 0].all()):  # padded on the left: positions start at the text
                    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
                    keywords["position_ids"] = positions.to(device)
            body(**keywords)
            if isinstance(running, RunningGroups):
                running.end()


def _as_inputs(batch: Batch) -> dict[str, Tensor]:
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise SimdiffError(
            f"score: input_ids must be integers (batch, sequence), got {ids.dtype} "
            f"of shape {tuple(ids.shape)}"
        )
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise SimdiffError(
            f"score: attention_mask must have shape {tuple(ids.shape)} like input_ids, "
            f"got {tuple(mask.shape)}"
        )
    return {"input_ids": ids, "attention_mask": mask}
