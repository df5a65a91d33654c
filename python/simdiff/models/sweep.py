"""One pass over the layers of a streamed model, with all windows and any number of plans."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.progress import track_layers
from simdiff.models.identity import shapes_of
from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.state_files import OffloadFolder, StateSets, check_free
from simdiff.models.streamed import WeightStream, stream_of

Batches = Sequence[Mapping[str, Tensor]]
Plan = frozenset[int]
WHOLE: Plan = frozenset()


class Watcher(Protocol):
    """Sees every layer of the whole model in a pass of scores, while its weights are there."""

    tokens: Tensor
    """Further ids `(1, length)`, whose states take every layer before those of the batches do."""

    def step(
        self,
        partial: LayerByLayer,
        batch: Mapping[str, Tensor],
        states: Tensor | None,
        layer: int,
        *,
        own: bool,
    ) -> Tensor:
        """Take the place of `LayerByLayer.step`; `own` are the states of `tokens`."""

    def finished(self) -> list[Any]:
        """What was found in the layers that all states have taken, as plain JSON values."""

    def go_on(self, found: list[Any]) -> None:
        """Take what `finished` returned before a run was interrupted."""


class Sweep:
    """Applies every layer once to the states of all windows, for each plan that keeps it.

    A plan is a set of layers that pass their input on. The states that enter layer i depend on the
    removed layers before i alone, so plans that agree in those share them.

    Args:
        model: a streamed model, see `simdiff.models.streamed`.
        batches: token ids, as `model_inputs` makes them.
        plans: sets of removed layers, each with the indices of the batches that it reads.
        purpose: tells this pass from others of a run, and is the text of the bar.
        keep: keep the states that enter every layer, for the whole model alone; the stream's
            watcher sees them.

    Raises:
        SimdiffError: no space on the disk, or a folder that cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        plans: Mapping[Plan, Collection[int]] | None = None,
        *,
        purpose: str,
        keep: bool = False,
    ) -> None:
        """Find what an earlier run of the same pass has left."""
        stream = stream_of(model)
        assert stream is not None
        self._stream, self._keep = stream, keep
        self._watcher: Watcher | None = stream.watcher if keep else None
        own = [] if self._watcher is None else [{"input_ids": self._watcher.tokens}]
        self._batches = [_moved(batch, stream.device) for batch in (*batches, *own)]
        plans = {WHOLE: range(len(self._batches))} if plans is None else plans
        self.plans = {plan: sorted(plans[plan]) for plan in sorted(plans, key=sorted)}
        self._purpose = purpose
        self._model = model
        self.directory = self._directory()
        self._sets = StateSets(self.directory, stream.options.memory, stream.device)
        found = self._sets.manifest
        self._first = int(found.get("layer", 0))
        self._frontier: dict[Plan, str | None] = {WHOLE: None}
        if found:
            self._frontier = {frozenset(removed): name for removed, name in found["frontier"]}
            if self._watcher is not None:
                self._watcher.go_on(found["watched"])
        self._partial = LayerByLayer(model, found.get("length", "unknown"))

    def _directory(self) -> Path | None:
        folder = offload_folder(self._model)
        if folder is None:
            return None
        plans = [[sorted(plan), read] for plan, read in self.plans.items()]
        directory = folder.directory(self._purpose, [plans, digest_of(self._batches), self._keep])
        check_free(directory, self.most_bytes())
        return directory

    def most_bytes(self) -> int:
        """Of the states that lie on the disk, or in memory without a folder, at once."""
        embedding = self._model.get_input_embeddings().weight
        width = int(self._model.config.get_text_config(decoder=True).hidden_size)
        tokens = sum(batch["input_ids"].numel() for batch in self._batches)
        one = tokens * width * embedding.element_size()
        depth = self._stream.head
        if self._keep:
            return one * depth
        counts = [len({plan & {*range(layer)} for plan in self.plans}) for layer in range(depth)]
        return one * max(itertools.chain(map(sum, itertools.pairwise(counts)), counts))

    @contextlib.contextmanager
    def finished(self, *, head: bool = False) -> Iterator[LayerByLayer]:
        """Run all layers; inside the with block the states can be read.

        Args:
            head: load the language-model head too.
        """
        depth = self._stream.head
        needed = [
            layer
            for layer in range(self._first, depth)
            if any(layer not in plan for plan in self.plans)
            or (layer == 0 and not self._partial.known)
        ]
        stages = needed + [depth] * head
        total = sum(map(self._stream.num_bytes, stages))
        folder = self._stream.folder
        with (
            contextlib.nullcontext() if folder is None else folder.held(),
            contextlib.closing(self._stream.each(stages)) as loaded,
            contextlib.closing(self._sets),
            torch.inference_mode(False),
            torch.no_grad(),
            self._partial,
        ):
            with track_layers(depth, total, self._purpose, done=self._first) as advance:
                for layer in range(self._first, depth):
                    read = self._stream.num_bytes(next(loaded)) if layer in needed else 0
                    self._apply(layer)
                    advance(read)
                if head:
                    next(loaded)
                    advance(self._stream.num_bytes(depth), layers=0)
            yield self._partial

    def states(self, plan: Plan, batch: int) -> Tensor:
        """What leaves the last layer, without the layers of a plan."""
        return self._states(self._frontier[plan], batch)

    def all_states(self, batch: int) -> list[Tensor]:
        """The states of the whole model before, between and after all layers."""
        names = [_name(layer + 1, 0) for layer in range(self._stream.head)]
        first = self._partial.embedded(self._batches[batch])
        return [first, *self._sets.get_all(names, batch)]

    def drop_states(self) -> None:
        """Remove the files of a finished pass whose result was written beside them."""
        assert self.directory is not None
        for path in self.directory.glob("*.states"):
            path.unlink()

    def _states(self, name: str | None, batch: int) -> Tensor:
        if name is None:  # all layers before this one are skipped
            return self._partial.embedded(self._batches[batch])
        return self._sets.get(name, batch)

    def _apply(self, layer: int) -> None:
        """Apply a layer to the states of every plan that keeps it."""
        if not self._partial.known:
            self._partial.learn()
        after: dict[Plan, str | None] = {}
        for place, (removed, name) in enumerate(self._frontier.items()):
            plans = [plan for plan in self.plans if plan & {*range(layer)} == removed]
            if any(layer in plan for plan in plans):
                after[removed | {layer}] = name
            staying = [plan for plan in plans if layer not in plan]
            if staying:
                made = _name(layer + 1, place)
                for index in self._order({index for plan in staying for index in self.plans[plan]}):
                    before = None if name is None else self._sets.get(name, index)
                    self._sets.put(made, index, self._step(index, before, layer))
                after[removed] = made
        self._frontier = after
        kept = [_name(index + 1, 0) for index in range(layer)] if self._keep else []
        names = [name for name in after.values() if name is not None]
        self._sets.commit(
            list(dict.fromkeys(kept + names)),
            layer=layer + 1,
            length=self._partial.length,
            frontier=[[sorted(removed), name] for removed, name in after.items()],
            **({} if self._watcher is None else {"watched": self._watcher.finished()}),
        )

    def _order(self, batches: Collection[int]) -> list[int]:
        """Those of the watcher, which stand last, go first."""
        ordered = sorted(batches)
        return ordered if self._watcher is None else ordered[-1:] + ordered[:-1]

    def _step(self, index: int, states: Tensor | None, layer: int) -> Tensor:
        batch = self._batches[index]
        if self._watcher is None:
            return self._partial.step(batch, states, layer)
        own = index == len(self._batches) - 1
        return self._watcher.step(self._partial, batch, states, layer, own=own)


def _name(layer: int, place: int) -> str:
    """Of the file of a set of states, by the layer that they enter."""
    return f"{layer:04d}-{place:04d}.states"


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch where the model is: to move it for every layer would wait for the GPU each time."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def digest_of(batches: Batches) -> str:
    """SHA-256 of the tokens that a pass reads."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def offload_folder(model: PreTrainedModel) -> OffloadFolder | None:
    """The folder for the states of a streamed model, made when it is first asked for."""
    stream = stream_of(model)
    if stream is None or stream.options.folder is None:
        return None
    if stream.folder is None:
        path, (number, count) = stream.options.folder, ranks.whole()
        if count > 1:  # each process has states of its own
            path = path.with_name(f"{path.name}-{number}-of-{count}")
        with ranks.alone():
            stream.folder = OffloadFolder(path, _key(model, stream))
    return stream.folder


def _key(model: PreTrainedModel, stream: WeightStream) -> dict[str, Any]:
    identity = shapes_of(model, "")
    names = ("architecture", "num_layers", "fingerprint", "dtype")
    return {
        **{name: identity[name] for name in names},
        "weight files": {name: list(found) for name, found in stream.files.items()},
        "device": stream.device.type,
    }


def remove_states(model: PreTrainedModel) -> None:
    """Remove the hidden states that passes of a model left; nothing for a model in memory."""
    stream = stream_of(model)
    if stream is not None and stream.folder is not None:
        stream.folder.remove()
        stream.folder = None


def refuse_streamed(model: PreTrainedModel, what: str, instead: str) -> None:
    """Refuse a streamed model where its weights are needed together.

    Raises:
        SimdiffError: the model is streamed.
    """
    if stream_of(model) is not None:
        raise SimdiffError(f"{what} needs the whole model in memory, got a streamed one: {instead}")
