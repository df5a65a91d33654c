"""SequenceScores: the scores of every group of sequences, from which the bootstrap draws."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from simdiff.scoring.block_scores import BLOCK_SCORES, BlockScores, Matrix
from simdiff_kernels import METRICS

if TYPE_CHECKING:
    from simdiff_kernels import RunningSummary

Array: TypeAlias = NDArray[np.float64]
"""numpy, not torch: who plans from a file of scores does not wait for torch."""

ENCODING = "base64 of little-endian float32, one row for each group"

# Names of the block scores that are a maximum over tokens; all others are means.
_MAXIMUM = "_maximum"


@dataclass(frozen=True)
class GroupScores:
    """The scores of one group of consecutive sequences."""

    first: int
    num_sequences: int
    """Number of sequences that have a token that counts."""
    summary: RunningSummary
    blocks: BlockScores | None
    last_token_angles: Matrix | None


@dataclass(frozen=True, eq=False)
class SequenceScores:
    """Means and maxima of every group of calibration sequences.

    A group is one sequence, or several consecutive ones. A matrix of blocks is stored as its
    entries above the diagonal, row by row. Values are rounded to float32 (relative error 6e-8, far
    below the differences between sequences) and clamped to its range, both in memory and in the
    file, so that both give the same plans.
    """

    first: tuple[int, ...]
    """Index of the first sequence of each group in the calibration text."""
    num_sequences: tuple[int, ...]
    """Number of sequences in each group that have a token that counts."""
    num_tokens: tuple[int, ...]
    """Number of tokens in each group."""
    means: dict[str, Array]
    """Mean of each metric in `METRICS`, `(groups, num_layers)`, float64."""
    maxima: dict[str, Array]
    blocks: dict[str, Array]
    """Each score of blocks, `(groups, L (L + 1) / 2)`; empty if no blocks were scored."""
    last_token_angles: Array | None

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal."""
        return isinstance(other, SequenceScores) and self.to_dict() == other.to_dict()

    @property
    def num_groups(self) -> int:
        """Number of groups that have a token that counts."""
        return len(self.num_tokens)

    @classmethod
    def from_groups(cls, groups: Sequence[GroupScores]) -> SequenceScores:
        """Collect the scores of one or more groups."""
        summaries = [group.summary for group in groups]
        blocks = [group.blocks for group in groups if group.blocks is not None]
        angles = [group.last_token_angles for group in groups if group.last_token_angles]
        return cls(
            first=tuple(group.first for group in groups),
            num_sequences=tuple(group.num_sequences for group in groups),
            num_tokens=tuple(int(summary.num_tokens[0]) for summary in summaries),
            means={name: _rounded([s[name].mean.tolist() for s in summaries]) for name in METRICS},
            maxima={
                name: _rounded([s[name].maximum.tolist() for s in summaries]) for name in METRICS
            },
            blocks={
                name: _rounded([_upper(b.metrics[name]) for b in blocks])
                for name in BLOCK_SCORES
                if blocks and name in blocks[0].metrics
            },
            last_token_angles=_rounded([_upper(matrix) for matrix in angles]) if angles else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        angles = self.last_token_angles
        return {
            "first": list(self.first),
            "num_sequences": list(self.num_sequences),
            "num_tokens": list(self.num_tokens),
            "encoding": ENCODING,
            "means": {name: _encoded(values) for name, values in self.means.items()},
            "maxima": {name: _encoded(values) for name, values in self.maxima.items()},
            "blocks": {name: _encoded(values) for name, values in self.blocks.items()},
            "last_token_angles": None if angles is None else _encoded(angles),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], num_layers: int) -> SequenceScores:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing, has a wrong shape, or is not a
                finite number.
        """
        if content["encoding"] != ENCODING:
            raise ValueError(f"sequences must be {ENCODING}, got {content['encoding']!r}")
        counts = {
            key: tuple(map(int, content[key])) for key in ("first", "num_sequences", "num_tokens")
        }
        groups = len(counts["first"])
        if groups < 1 or any(len(values) != groups for values in counts.values()):
            raise ValueError(
                "sequences must have first, num_sequences and num_tokens of each group"
            )
        if min(*counts["num_sequences"], *counts["num_tokens"]) < 1:
            raise ValueError("every group of sequences must have a sequence and a token")

        def tables(key: str, width: int) -> dict[str, Array]:
            named = dict(content[key]).items()
            return {name: _decoded(f"{key} {name}", text, groups, width) for name, text in named}

        pairs, angles = num_layers * (num_layers + 1) // 2, content["last_token_angles"]
        found = cls(
            **counts,
            means=tables("means", num_layers),
            maxima=tables("maxima", num_layers),
            blocks=tables("blocks", pairs),
            last_token_angles=None
            if angles is None
            else _decoded("last_token_angles", angles, groups, pairs),
        )
        missing = [name for name in METRICS if name not in {*found.means} & {*found.maxima}]
        if missing:
            raise ValueError(f"sequences must have {', '.join(missing)}")
        return found

    def cluster_standard_errors(self, name: str) -> list[float | None]:
        """Standard errors of a metric's mean in each layer, for independent groups of sequences.

        With n_g tokens of mean m_g in group g of G, N tokens of mean m in all,

            s.e.^2 = G / (G - 1) * sum over g of (n_g (m_g - m) / N)^2

        the linearised variance of a ratio of sums; None for a single group. If every sequence is a
        group, the tokens of a sequence may depend on each other in any way.

        Source: Cochran, "Sampling Techniques" (3rd ed., 1977), Sections 6.3 and 9A.
        """
        groups = self.num_groups
        if groups < 2:
            return [None] * self.means[name].shape[1]
        tokens = np.array(self.num_tokens, np.float64)
        share = (tokens / tokens.sum())[:, None]
        values = self.means[name]
        gaps = share * (values - (share * values).sum(0))
        errors: list[float | None] = np.sqrt((gaps**2).sum(0) * (groups / (groups - 1))).tolist()
        return errors


def is_maximum(name: str) -> bool:
    """Whether a block score is a maximum over tokens."""
    return name.endswith(_MAXIMUM)


def _upper(matrix: Matrix) -> Array:
    upper: Array = np.array(matrix, np.float64)[above_diagonal(len(matrix))]
    return upper


def to_matrix(upper: Array, num_layers: int) -> Matrix:
    """Make `matrix[start][stop]` from the entries above its diagonal."""
    full = np.zeros((num_layers + 1, num_layers + 1))
    full[above_diagonal(num_layers + 1)] = upper
    return tuple(map(tuple, full.tolist()))


def above_diagonal(size: int) -> NDArray[np.bool_]:
    """Which entries of a matrix `(size, size)` are above its diagonal."""
    return np.triu(np.ones((size, size), np.bool_), 1)


def _rounded(rows: Sequence[Sequence[float]] | Sequence[Array]) -> Array:
    largest = np.finfo(np.float32).max
    return np.stack(list(map(np.asarray, rows))).clip(-largest, largest).astype("<f4").astype("<f8")


def _encoded(values: Array) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _decoded(what: str, text: str, groups: int, width: int) -> Array:
    raw = base64.b64decode(text, validate=True)
    if len(raw) != 4 * groups * width:
        raise ValueError(
            f"{what} of sequences must have {groups} x {width} values, got {len(raw) / 4:g}"
        )
    values = np.frombuffer(raw, "<f4").astype(np.float64)
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{what} of sequences: a value is not finite")
    return values.reshape(groups, width)
