"""LayerScores, the content of scores.json: how every layer changed the calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import as_object, header, read_json, write_json
from simdiff.scoring.block_scores import (
    OPTIONAL_SCORES,
    BlockScores,
    Matrix,
    matrix_from_rows,
    matrix_to_rows,
)
from simdiff.scoring.group_scores import SequenceScores
from simdiff.scoring.metric_tables import LeadingScores, MetricTable
from simdiff_kernels import METRICS

SCHEMA = "simdiff.scores"


@dataclass(frozen=True)
class LayerScores:
    """The scores from which every criterion is computed: `metrics[name].mean[layer]`.

    The names are those of `simdiff_kernels.METRICS`. Layers are counted from 0.
    """

    metrics: dict[str, MetricTable]
    num_tokens: int
    """Number of tokens averaged, the same for every layer."""
    model: dict[str, Any]
    calibration: dict[str, Any]
    provenance: dict[str, Any]
    blocks: BlockScores | None = None
    """Scores of every run of consecutive layers; None if the pass did not make them."""
    last_token_angles: Matrix | None = None
    """Last-token angle of every run of consecutive layers, [start][stop]; see
    `RunningBlockGroups`."""
    sublayers: Mapping[str, Any] | None = None
    """Scores of attention and MLP sub-layers as in the file, see `SublayerScores`; None without."""
    sequences: SequenceScores | None = None
    """Scores of every group of sequences; None in files of earlier versions."""
    leading: LeadingScores | None = None
    """Statistics of the first tokens of every sequence, if the pass kept them apart."""
    stability: dict[str, Any] | None = None
    """How the amount of text was found, see `simdiff.jobs.stability`; None if it was given."""

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
            **header(SCHEMA),
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
            SimdiffError: the file is missing, damaged, incomplete, or of a newer version.
        """
        content = read_json(path, SCHEMA)
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
                model=as_object(content["model"]),
                calibration=as_object(content["calibration"]),
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
