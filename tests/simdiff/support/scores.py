"""Scores of the tiny model with means written over, and scores of no model."""

from __future__ import annotations

import dataclasses

import numpy as np

from simdiff.scoring.block_scores import BLOCK_SCORES, BlockScores
from simdiff.scoring.group_scores import SequenceScores, above_diagonal, to_matrix
from simdiff.scoring.metric_tables import TokenLocation
from simdiff.scoring.scores import LayerScores, MetricTable
from simdiff_kernels import METRICS


def with_means(scores: LayerScores, **columns: tuple[float, ...]) -> LayerScores:
    """The same scores with other means (and maxima one above) of some metrics."""
    metrics = dict(scores.metrics)
    for name, values in columns.items():
        old = metrics[name]
        metrics[name] = MetricTable(
            values, old.standard_error, tuple(v + 1 for v in values), old.location
        )
    return dataclasses.replace(scores, metrics=metrics)


def drawn_scores(num_layers: int, num_groups: int = 9, seed: int = 0) -> LayerScores:
    """Scores of random sequences, so unlike that draws of them give different plans."""
    random = np.random.default_rng(seed)
    share = np.full(num_groups, 1 / num_groups)

    def like(values: np.ndarray) -> np.ndarray:
        return (values * random.uniform(0.5, 1.5, (num_groups, len(values)))).astype("<f4") * 1.0

    alone = random.uniform(0.2, 0.24, num_layers)
    ends = np.concatenate([[0], np.cumsum(alone)])
    blocks = (ends[None] - ends[:, None])[above_diagonal(num_layers + 1)]
    means = {name: like(alone) for name in METRICS}
    pairs = {name: like(blocks) for name in BLOCK_SCORES}
    angles = like(blocks)
    nowhere = (TokenLocation(0, 0, 0),) * num_layers
    return LayerScores(
        metrics={
            name: MetricTable(
                tuple((share @ rows).tolist()),
                (None,) * num_layers,
                tuple(rows.max(0).tolist()),
                nowhere,
            )
            for name, rows in means.items()
        },
        num_tokens=16 * num_groups,
        model={"name": "drawn", "num_layers": num_layers},
        calibration={},
        provenance={"backend": "none", "device": "none"},
        blocks=BlockScores(
            {name: to_matrix(share @ rows, num_layers) for name, rows in pairs.items()}
        ),
        last_token_angles=to_matrix(share @ angles, num_layers),
        sequences=SequenceScores(
            first=tuple(range(num_groups)),
            num_sequences=(1,) * num_groups,
            num_tokens=(16,) * num_groups,
            means=means,
            maxima=means,
            blocks=pairs,
            last_token_angles=angles,
        ),
    )
