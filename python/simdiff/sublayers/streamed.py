"""Scores of the sub-layers of a streamed model: each layer is found out while it is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.layer_calls import HookHandles
from simdiff.models.streamed import stream_of
from simdiff.scoring.metric_tables import metric_tables
from simdiff.sublayers.hooks import LayerWatch, RunningNormChanges, SublayerHooks
from simdiff.sublayers.probe import few_tokens, layer_steps
from simdiff.sublayers.scores import SublayerScores
from simdiff.sublayers.structure import LayerSteps, SublayerMap
from simdiff_kernels import RunningScores


class StreamedSublayers:
    """A `simdiff.models.sweep.Watcher`: inside the with block `score` scores sub-layers too.

    The states of the few tokens by which `find_sublayers` finds them take part in the pass. What a
    finished layer has is written with its states, so that an interrupted pass goes on.

    Args:
        model: a streamed model.
        ids: token ids `(batch, sequence)` of each batch.
        backend: of the scorers.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[Tensor], backend: str | None) -> None:
        """Know no layer yet."""
        stream = stream_of(model)
        assert stream is not None
        self.tokens = few_tokens(model)
        self.found: list[SublayerScores] = []
        """The scores of each finished layer."""
        self._model, self._stream, self._ids, self._backend = model, stream, ids, backend
        self._layer: _Layer | None = None

    def __enter__(self) -> StreamedSublayers:
        """Be the watcher of the model's stream."""
        self._stream.watcher = self
        return self

    def __exit__(self, *_: object) -> None:
        """Be it no more."""
        self._stream.watcher = None

    def step(
        self,
        partial: LayerByLayer,
        batch: Mapping[str, Tensor],
        states: Tensor | None,
        layer: int,
        *,
        own: bool,
    ) -> Tensor:
        """Find out a layer by the few tokens, and score it by all others."""
        if own:
            arguments = partial.arguments(batch, states, layer)
            with partial.unwrapped(layer) as module:
                steps = layer_steps(layer, module, *arguments)
            self._layer = _Layer(self._model, partial.layers[layer], steps, self._backend)
            return partial.step(batch, states, layer)
        assert self._layer is not None
        entering = partial.embedded(batch) if states is None else states
        self._layer.hooks.begin(batch.get("attention_mask"))
        with self._layer as watched:
            watched.watch.enter(entering)
            left = partial.step(batch, states, layer)
            watched.watch.leave(left)
        return left

    def finished(self) -> list[Any]:
        """The scores of all layers so far; the last one has seen all batches."""
        assert self._layer is not None
        self.found.append(self._layer.scores(self._ids))
        return [scores.to_dict() for scores in self.found]

    def go_on(self, found: list[Any]) -> None:
        """Take the scores of the layers that an earlier run has finished."""
        self.found = [SublayerScores.of_some(content) for content in found]


class _Layer(HookHandles):
    """The sub-layers of one layer; entered, what lies in it is hooked."""

    def __init__(
        self,
        model: PreTrainedModel,
        module: nn.Module,
        steps: LayerSteps,
        backend: str | None,
    ) -> None:
        super().__init__()
        found = SublayerMap((steps,))
        self._module, self._names = module, found.names
        self._running = RunningScores(len(found.names), backend=backend)
        self._norm_changes = RunningNormChanges(len(found.names))
        self.hooks = SublayerHooks(model, found, self._running, self._norm_changes)
        self.watch = LayerWatch(self.hooks, 0, steps)

    def _register(self) -> Iterator[RemovableHandle]:
        yield from self.watch.register_inside(self._module)

    def scores(self, ids: Sequence[Tensor]) -> SublayerScores:
        tables = metric_tables(self._running.finish(), ids)
        return SublayerScores(self._names, tables, self._norm_changes.finish())
