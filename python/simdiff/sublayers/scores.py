"""SublayerScores: how every attention and every MLP changed the calibration tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.scoring.block_scores import BLOCK_SCORES, BlockScores
from simdiff.scoring.metric_tables import MetricTable, metric_tables
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.structure import KINDS, SublayerName, find_sublayers
from simdiff_kernels import METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from simdiff.data.batches import Batch


@dataclass(frozen=True)
class SublayerScores:
    """The scores of every residual step, in order of depth: attention 0, mlp 0, attention 1, ...

    A row of `metrics` compares the hidden states before and after the contribution of a sub-layer,
    see `SublayerHooks`. The names are those of `simdiff_kernels.METRICS`.
    """

    names: tuple[SublayerName, ...]
    metrics: dict[str, MetricTable]
    norm_change: tuple[float, ...]
    """Mean of (||y|| - ||x||)^2 / (2 ||x|| ||y||); plus the cosine distance it is the default
    criterion's cost."""

    @classmethod
    def from_scores(cls, scores: LayerScores) -> SublayerScores:
        """The scores of sub-layers in a file of scores.

        Raises:
            SimdiffError: the file has none, or they are damaged.
        """
        if scores.sublayers is None:
            raise SimdiffError(
                "these scores are of whole layers alone: for plans of attention or MLP sub-layers "
                "score the model again with `simdiff score --sublayers` (in Python, "
                "simdiff.sublayers.scores.score_with_sublayers)"
            )
        try:
            return cls._from_dict(scores.sublayers, scores.num_layers)
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                "the scores of sub-layers must hold finite values of every sub-layer, but are "
                f"damaged: {type(error).__name__}: {error}"
            ) from None

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any], num_layers: int) -> SublayerScores:
        found = cls.of_some(content)
        names = found.names
        if sorted(set(names)) != sorted(names) or {name.layer for name in names} != set(
            range(num_layers)
        ):
            raise ValueError(f"names must be sub-layers of {num_layers} layers, each once")
        return found

    @classmethod
    def of_some(cls, content: Mapping[str, Any]) -> SublayerScores:
        """What `to_dict` made of the scores of some layers.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        names = tuple(SublayerName(int(layer), kind) for layer, kind in content["names"])
        if not {name.kind for name in names} <= set(KINDS):
            raise ValueError(f"kinds must be {', '.join(KINDS)}")
        norm_change = tuple(map(float, content["norm_change"]))
        if len(norm_change) != len(names) or not all(map(math.isfinite, norm_change)):
            raise ValueError(f"norm_change must have {len(names)} finite entries")
        tables = {
            name: MetricTable.from_dict(content["metrics"][name], len(names)) for name in METRICS
        }
        return cls(names, tables, norm_change)

    @classmethod
    def joined(cls, parts: Sequence[SublayerScores]) -> SublayerScores:
        """The scores of several layers, one after the other, as those of all of them."""

        def all_of(tuples: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
            return tuple(itertools.chain.from_iterable(tuples))

        metrics = {
            name: MetricTable(
                *(
                    all_of(getattr(part.metrics[name], field.name) for part in parts)
                    for field in fields(MetricTable)
                )
            )
            for name in METRICS
        }
        names = all_of(part.names for part in parts)
        return cls(names, metrics, all_of(part.norm_change for part in parts))

    def to_dict(self) -> dict[str, Any]:
        """The entry `sublayers` of scores.json."""
        return {
            "names": [list(name) for name in self.names],
            "metrics": {name: table.to_dict() for name, table in self.metrics.items()},
            "norm_change": list(self.norm_change),
        }

    def as_layers(self, scores: LayerScores, rows: Sequence[int]) -> LayerScores:
        """Scores in which some sub-layers stand for layers, so that every criterion applies.

        Blocks of one sub-layer have their scores, which criteria of single layers read; all longer
        blocks cost infinity.

        Args:
            scores: the scores that contain this table.
            rows: indices into `names`.
        """
        metrics = {
            name: MetricTable(
                mean=tuple(table.mean[row] for row in rows),
                standard_error=tuple(table.standard_error[row] for row in rows),
                maximum=tuple(table.maximum[row] for row in rows),
                location=tuple(table.location[row] for row in rows),
            )
            for name, table in self.metrics.items()
        }
        means = {name: table.mean for name, table in metrics.items()} | {
            "squared_difference_maximum": metrics["squared_difference"].maximum,
            "norm_change": tuple(self.norm_change[row] for row in rows),
        }
        size = len(rows) + 1
        matrices = {
            name: tuple(
                tuple(
                    means[name][i] if j == i + 1 else math.inf if j > i else 0.0
                    for j in range(size)
                )
                for i in range(size)
            )
            for name in BLOCK_SCORES
            if name in means
        }
        return replace(
            scores,
            metrics=metrics,
            blocks=BlockScores(matrices),
            last_token_angles=None,
            sublayers=None,
            sequences=None,
            leading=None,
        )


def score_with_sublayers(
    model: PreTrainedModel, batches: Sequence[Batch], **options: Any
) -> LayerScores:
    """Score layers and blocks as `score` does, and attention and MLP sub-layers in the same pass.

    Args:
        model: the model.
        batches: calibration tokens, see `score`.
        options: further arguments of `score`.

    Raises:
        SimdiffError: the sub-layers of a layer cannot be told apart, or see `score`.
        simdiff_kernels.NonFiniteError: a hidden state contains NaN or Inf.
    """
    from torch import Tensor

    from simdiff.models.streamed import stream_of
    from simdiff.scoring.calibration_pass import score
    from simdiff.sublayers.hooks import RunningNormChanges, SublayerHooks
    from simdiff_kernels import RunningScores

    ids = [batch if isinstance(batch, Tensor) else batch["input_ids"] for batch in batches]
    if stream_of(model) is not None:
        from simdiff.sublayers.streamed import StreamedSublayers

        with StreamedSublayers(model, ids, options.get("backend")) as watcher:
            scores = score(model, batches, **options)
        return replace(scores, sublayers=SublayerScores.joined(watcher.found).to_dict())
    found = find_sublayers(model)
    running = RunningScores(len(found.names), backend=options.get("backend"))
    norm_changes = RunningNormChanges(len(found.names))
    with SublayerHooks(model, found, running, norm_changes):
        scores = score(model, batches, **options)
    tables = metric_tables(running.finish(), ids)
    table = SublayerScores(found.names, tables, norm_changes.finish())
    return replace(scores, sublayers=table.to_dict())
