"""MetricTable: one metric of every layer, made from running states, stored in scores.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simdiff.scoring.group_scores import SequenceScores
from simdiff_kernels import METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from simdiff_kernels import RunningSummary


@dataclass(frozen=True)
class TokenLocation:
    """The place and the id of a calibration token; sequence and position count from 0."""

    sequence: int
    position: int
    token_id: int


@dataclass(frozen=True)
class MetricTable:
    """One metric of every layer over the calibration tokens."""

    mean: tuple[float, ...]
    standard_error: tuple[float | None, ...]
    """Standard error of the mean, for independent tokens; None for a single token."""
    maximum: tuple[float, ...]
    location: tuple[TokenLocation, ...]
    """The token with the maximum."""
    cluster_standard_error: tuple[float | None, ...] = ()
    """Standard error of the mean, for independent sequences; empty if they are not stored apart."""

    @property
    def error(self) -> tuple[float | None, ...]:
        """The standard error for independent sequences if known, else that for tokens."""
        errors = self.cluster_standard_error
        return errors if errors and None not in errors else self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "mean": list(self.mean),
            "standard_error": list(self.standard_error),
            "cluster_standard_error": list(self.cluster_standard_error),
            "maximum": list(self.maximum),
            "location": [
                [token.sequence, token.position, token.token_id] for token in self.location
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], num_layers: int) -> MetricTable:
        """The inverse of `to_dict`; files of version 2 have no standard errors by sequences.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing, has a wrong length, or is not a
                finite number.
        """
        columns = {key: content[key] for key in ("mean", "standard_error", "maximum", "location")}
        clusters = content.get("cluster_standard_error") or []
        if clusters:
            columns["cluster_standard_error"] = clusters
        for key, values in columns.items():
            if not isinstance(values, list) or len(values) != num_layers or num_layers < 1:
                raise ValueError(f"{key} must have {num_layers} entries")
        numbers = [float(value) for key in ("mean", "maximum") for value in columns[key]]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a value is not finite")
        errors = columns["standard_error"]
        return cls(
            mean=tuple(map(float, columns["mean"])),
            standard_error=tuple(None if e is None else float(e) for e in errors),
            maximum=tuple(map(float, columns["maximum"])),
            location=tuple(TokenLocation(*map(int, token)) for token in columns["location"]),
            cluster_standard_error=tuple(None if e is None else float(e) for e in clusters),
        )


@dataclass(frozen=True)
class LeadingScores:
    """Statistics of the first tokens of every sequence, which the other statistics leave out."""

    skip_leading: int
    """Number of real tokens at the beginning of each sequence that are counted here."""
    num_tokens: int
    metrics: dict[str, MetricTable]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        tables = {name: table.to_dict() for name, table in self.metrics.items()}
        return {**vars(self), "metrics": tables}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], num_layers: int) -> LeadingScores:
        """The inverse of `to_dict`; raises what `MetricTable.from_dict` raises."""
        metrics = content["metrics"]
        return cls(
            int(content["skip_leading"]),
            int(content["num_tokens"]),
            {name: MetricTable.from_dict(metrics[name], num_layers) for name in METRICS},
        )


def metric_tables(
    summary: RunningSummary,
    ids: Sequence[Tensor],
    sequences: SequenceScores | None = None,
) -> dict[str, MetricTable]:
    """Make the tables of all metrics.

    Args:
        summary: statistics of the whole pass.
        ids: token ids `(batch, sequence)` of each batch.
        sequences: statistics of the same tokens by sequence, for standard errors.
    """

    def location(index: int) -> TokenLocation:
        sequence = 0
        for batch in ids:
            rows, length = batch.shape
            if index < rows * length:
                row, position = divmod(index, length)
                return TokenLocation(sequence + row, position, int(batch[row, position]))
            index -= rows * length
            sequence += rows
        raise AssertionError("index beyond the tokens that were fed")

    return {
        name: MetricTable(
            mean=tuple(summary[name].mean.tolist()),
            standard_error=tuple(
                None if math.isnan(error) else error
                for error in summary[name].standard_error.tolist()
            ),
            maximum=tuple(summary[name].maximum.tolist()),
            location=tuple(location(index) for index in summary[name].argmax.tolist()),
            cluster_standard_error=()
            if sequences is None
            else tuple(sequences.cluster_standard_errors(name)),
        )
        for name in METRICS
    }
