"""LayerScores: what every layer did to the calibration tokens; the calibration pass makes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.block_scores import (
    LATER_SCORES,
    BlockScores,
    Matrix,
    RunningBlocks,
    matrix_from_rows,
    matrix_to_rows,
)
from simdiff.errors import SimdiffError
from simdiff.files import header, read_json, write_json
from simdiff.hooks import LayerHooks
from simdiff.last_token import RunningLastTokenAngles
from simdiff.models import decoder_body, find_decoder_layers, model_identity
from simdiff.progress import track
from simdiff_kernels import METRICS, RunningScores, RunningSummary, default_backend

SCHEMA = "simdiff.scores"
# 2 added the blocks, 3 their angular distance; files of earlier versions are read without.
SCHEMA_VERSION = 3

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenLocation:
    """A calibration token: sequence and position are counted from 0."""

    sequence: int
    position: int
    token_id: int


@dataclass(frozen=True)
class MetricTable:
    """One metric of every layer over the calibration tokens."""

    mean: tuple[float, ...]
    standard_error: tuple[float | None, ...]
    """Of the mean, tokens taken as independent; None for a single token."""
    maximum: tuple[float, ...]
    location: tuple[TokenLocation, ...]
    """The token that attained the maximum."""


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

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.metrics[METRICS[0]].mean)

    def save(self, path: Path) -> None:
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
            "metrics": {
                name: {
                    "mean": list(table.mean),
                    "standard_error": list(table.standard_error),
                    "maximum": list(table.maximum),
                    "location": [
                        [token.sequence, token.position, token.token_id] for token in table.location
                    ],
                }
                for name, table in self.metrics.items()
            },
            "blocks": None if self.blocks is None else self.blocks.to_dict(),
            "last_token_angles": None
            if self.last_token_angles is None
            else matrix_to_rows(self.last_token_angles),
        }

    @classmethod
    def load(cls, path: Path) -> LayerScores:
        """Read scores.json.

        Raises:
            SimdiffError: missing, corrupt, incomplete, or written by a newer version.
        """
        content = read_json(path, SCHEMA, SCHEMA_VERSION)
        try:
            num_layers = content["num_layers"]
            metrics = {
                name: _metric_table(content["metrics"][name], num_layers) for name in METRICS
            }
            version = content["schema_version"]
            blocks = content["blocks"] if version > 1 else None
            if blocks is not None and version < 3:
                blocks = dict.fromkeys(LATER_SCORES) | dict(blocks)
            angles = content.get("last_token_angles")
            return cls(
                metrics=metrics,
                blocks=None if blocks is None else BlockScores.from_dict(blocks, num_layers),
                last_token_angles=None
                if angles is None
                else matrix_from_rows("last_token_angles", angles, num_layers),
                num_tokens=int(content["num_tokens"]),
                model=dict(content["model"]),
                calibration=dict(content["calibration"]),
                provenance={key: content[key] for key in ("backend", "device")},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must hold finite means and maxima of {', '.join(METRICS)} for every "
                f"layer, but is damaged: {type(error).__name__}: {error}"
            ) from None


def _metric_table(content: Mapping[str, Any], num_layers: int) -> MetricTable:
    columns = {key: content[key] for key in ("mean", "standard_error", "maximum", "location")}
    for key, values in columns.items():
        if not isinstance(values, list) or len(values) != num_layers or num_layers < 1:
            raise ValueError(f"{key} must have {num_layers} entries")
    numbers = [float(value) for key in ("mean", "maximum") for value in columns[key]]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a value is not finite")
    return MetricTable(
        mean=tuple(map(float, columns["mean"])),
        standard_error=tuple(None if e is None else float(e) for e in columns["standard_error"]),
        maximum=tuple(map(float, columns["maximum"])),
        location=tuple(TokenLocation(*map(int, token)) for token in columns["location"]),
    )


def score(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    name: str = "",
    calibration: Mapping[str, Any] | None = None,
    backend: str | None = None,
    blocks: bool = True,
    progress: bool = True,
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

    Raises:
        SimdiffError: no decoder layers found, no batches, or all tokens masked.
        simdiff_kernels.NonFiniteError: a hidden state held NaN or Inf.
    """
    layers = find_decoder_layers(model)
    inputs = [_as_inputs(batch) for batch in batches]
    if not inputs:
        raise SimdiffError("score: batches must hold at least one batch, got none")
    if not any(bool(batch["attention_mask"].any()) for batch in inputs):
        raise SimdiffError("score: attention_mask must leave some token, got all tokens masked")
    running = RunningScores(len(layers), backend=backend)
    running_blocks = RunningBlocks(len(layers), backend=backend) if blocks else None
    last_tokens = RunningLastTokenAngles(len(layers)) if blocks else None
    feed_forward(
        model,
        layers.modules,
        running,
        track(inputs, "score") if progress else inputs,
        running_blocks,
        last_tokens,
    )
    summary = running.finish()
    device = next(layers.modules.parameters()).device.type
    return LayerScores(
        metrics=_tables(summary, inputs),
        blocks=None if running_blocks is None else running_blocks.finish(),
        last_token_angles=None if last_tokens is None else last_tokens.finish(),
        num_tokens=int(summary.num_tokens[0]),
        model=model_identity(model, name),
        calibration=dict(calibration or {}),
        provenance={"backend": backend or default_backend(device), "device": device},
    )


@torch.no_grad()
def feed_forward(
    model: PreTrainedModel,
    layers: torch.nn.ModuleList,
    running: RunningScores,
    inputs: Iterable[dict[str, Tensor]],
    blocks: RunningBlocks | None = None,
    last_tokens: RunningLastTokenAngles | None = None,
) -> None:
    """The calibration pass: every batch through the decoder, its layers feeding the scores."""
    body = decoder_body(model)
    device = model.get_input_embeddings().weight.device
    with LayerHooks(layers, running, blocks, last_tokens) as hooks:
        for batch in inputs:
            mask = batch["attention_mask"]
            padded = not bool(mask.all())
            keywords = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
            hooks.attention_mask = None
            hooks.token_shape = tuple(batch["input_ids"].shape)
            if padded:
                keywords["attention_mask"] = mask.to(device)
                hooks.attention_mask = mask.to(device).bool()  # once, not per layer
                if not bool(mask[:, 0].all()):  # padded on the left: positions start at the text
                    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
                    keywords["position_ids"] = positions.to(device)
            body(**keywords)


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


def _tables(summary: RunningSummary, inputs: list[dict[str, Tensor]]) -> dict[str, MetricTable]:
    def location(index: int) -> TokenLocation:
        sequence = 0
        for batch in inputs:
            ids = batch["input_ids"]
            if index < ids.numel():
                row, position = divmod(index, ids.shape[1])
                return TokenLocation(sequence + row, position, int(ids[row, position]))
            index -= ids.numel()
            sequence += ids.shape[0]
        raise AssertionError("index beyond the tokens that were fed")

    return {
        name: MetricTable(
            mean=tuple(metric.mean.tolist()),
            standard_error=tuple(
                None if math.isnan(error) else error for error in metric.standard_error.tolist()
            ),
            maximum=tuple(metric.maximum.tolist()),
            location=tuple(location(index) for index in metric.argmax.tolist()),
        )
        for name, metric in summary.items()
    }
