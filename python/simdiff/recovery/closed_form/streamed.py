"""The correction of a model larger than memory, whose layers are loaded one at a time.

One pass over the weights corrects all layers: each is read once, takes the dense states a layer
further, and, where it stays, is solved for as soon as the dense states have come to the depth that
it should reproduce. The pruned model's states lie beside the dense model's, in memory within a
bound and on the disk. What was found is written with each finished layer, so that a killed run goes
on from there. A corrected weight is a file of its own, which is read in the place of the stored one
from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs
from simdiff.errors import SimdiffError
from simdiff.io.progress import track_layers
from simdiff.io.safetensors_header import StoredTensor
from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.state_files import StateSets, check_free
from simdiff.models.streamed import WeightStream, stream_of
from simdiff.models.structure import find_decoder_layers
from simdiff.models.sweep import Batches, digest_of, offload_folder
from simdiff.models.tensor_reader import DTYPES, bytes_of
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.closed_form.changes import Change
from simdiff.recovery.closed_form.correction import BatchStates, Correction
from simdiff.recovery.closed_form.method import (
    checked_settings,
    losses_of,
    outcome_of,
    unseen_windows,
)
from simdiff.recovery.closed_form.precision import autocasts
from simdiff.recovery.closed_form.settings import LayerFit, PartFit
from simdiff.recovery.methods import RecoveryOutcome
from simdiff.recovery.record import digest

_PURPOSE = "correct layers"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@torch.no_grad()
def recover_streamed(
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Tensor,
    *,
    options: Mapping[str, Any],
    batch_size: int,
) -> tuple[RecoveryOutcome, dict[str, str]]:
    """Correct a streamed model in closed form; see `simdiff.recovery.methods.Recover`.

    The numbers are those of the model in memory. Afterwards the model's stream reads the corrected
    weights in the place of the stored ones, see `WeightStream.replaced`.

    Returns:
        What was found, and the digest of every changed parameter by its name in the pruned model.

    Raises:
        SimdiffError: see `recover`; no offload folder; a weight that is not stored as it is.
    """
    settings = checked_settings(options)
    count = unseen_windows(windows, settings.unseen_share)
    parts = windows[:-count].split(batch_size), windows[-count:].split(batch_size)
    fitted, unseen = (model_inputs(part, "recovery") for part in parts)
    run = StreamedCorrection(model, model, list(plan.kept), fitted, unseen, settings)
    run.check()
    outcome = outcome_of(run, run.correct())
    chosen = list(run.corrected)[: outcome.details["corrected"]]
    run.use(len(chosen))
    changed: dict[str, str] = {}
    for position in chosen:
        changed |= {name: digest(_read(one)) for name, one in run.corrected[position].items()}
    return outcome, changed


def _read(stored: StoredTensor) -> Tensor:
    """A weight from a file of its own."""
    content = torch.frombuffer(bytearray(stored.path.read_bytes()), dtype=DTYPES[stored.dtype])
    return content.view(stored.shape)


class _States:
    """The states of all batches at one depth, which lie in a set; None is the embeddings."""

    def __init__(
        self, sets: StateSets, name: str | None, batches: Batches, partial: LayerByLayer
    ) -> None:
        self.name = name
        self._sets, self._batches, self._partial = sets, batches, partial

    def __getitem__(self, number: int) -> Tensor:
        if self.name is None:
            return self._partial.embedded(self._batches[number])
        return self._sets.get(self.name, number)

    def __setitem__(self, number: int, states: Tensor) -> None:
        assert self.name is not None
        self._sets.put(self.name, number, states)


class StreamedCorrection(Correction):
    """A `Correction` of a streamed model, whose own layers are those of the pruned one.

    It is made with the model in both places.
    """

    corrected: dict[int, dict[str, StoredTensor]]
    """The files of the corrected weights by position, and by their names in the pruned model."""
    _stream: WeightStream
    _sets: StateSets
    _partial: LayerByLayer
    _weights: Path
    _held_bytes: int

    def correct(self) -> dict[int, float]:
        """Correct all layers, from where an earlier run was interrupted; returns `losses_of` it."""
        stream, folder = stream_of(self.model), offload_folder(self.model)
        assert stream is not None
        if folder is None:
            raise SimdiffError("recovery of a streamed model needs a folder: give one")
        course = [self.kept, dataclasses.asdict(self.settings), len(self.fitted)]
        course += [digest_of(self.batches)]
        self._stream = stream
        self._weights = folder.directory("corrected weights", course)
        directory = folder.directory(_PURPOSE, course)
        check_free(directory, self._most_bytes())
        self._sets = StateSets(directory, stream.options.memory, stream.device)
        self._held_bytes = 0
        found = self._sets.manifest
        self.fits = [LayerFit.of(fit) for fit in found.get("fits", [])]
        self.parts = [PartFit.of(part) for part in found.get("parts", [])]
        self.most_features = int(found.get("most_features", 0))
        self.corrected = {
            int(position): {
                name: StoredTensor(stored, dtype, tuple(shape), self._weights / file, 0, num_bytes)
                for name, (stored, dtype, shape, file, num_bytes) in tensors.items()
            }
            for position, tensors in found.get("corrected", {}).items()
        }
        first, pending = int(found.get("layer", 0)), found.get("pending")
        self.positions = [position for position in self.corrected if position != pending]
        if "losses" in found:
            return {int(count): float(loss) for count, loss in found["losses"].items()}
        if pending is not None:  # what was corrected within it already
            stream.replace([*self.corrected.get(pending, {}).values()])
        partial = LayerByLayer(
            self.model, found.get("length", "unknown"), autocast=autocasts(self.model)
        )
        self._partial = partial
        self.targets = self._set(found.get("dense"))
        self.states = self._set(found.get("pruned"))
        self.branches = {
            int(count): self._set(name) for count, name in found.get("branches", {}).items()
        }
        waiting = [] if pending is None else [self.kept[pending]]
        layers = range(first, stream.head)
        stages = [*waiting, *layers, stream.head]
        total = sum(map(stream.num_bytes, stages))
        with (
            folder.held(),
            contextlib.closing(stream.each(stages)) as loaded,
            contextlib.closing(self._sets),
            torch.inference_mode(False),
            torch.no_grad(),
            partial,
            track_layers(stream.head, total, _PURPOSE, done=first) as advance,
        ):
            for layer in waiting:
                next(loaded)
                stream.hold(layer)
                advance(stream.num_bytes(layer), layers=0)
            for layer in layers:
                next(loaded)
                pending = self._layer(layer, pending)
                self._commit(layer + 1, pending)
                advance(stream.num_bytes(layer))
            advance(stream.num_bytes(next(loaded)), layers=0)
            losses = losses_of(self, partial)
            self._commit(stream.head, None, losses)
        return losses

    def use(self, count: int) -> None:
        """Let the stream read the first `count` corrections in the place of the stored weights."""
        some = list(self.corrected.values())[:count]
        self._stream.replace([tensor for tensors in some for tensor in tensors.values()])

    def _layer(self, layer: int, pending: int | None) -> int | None:
        """Take the dense states past a layer, and correct what they are the target of.

        Args:
            layer: in the dense model; its weights are there.
            pending: position of the layer before a cut whose target is not reached yet; its weights
                are held.

        Returns:
            The position that is pending now.
        """
        if not self._partial.known:
            self._partial.learn()
        entering = self.targets
        if layer in self.kept and (position := self.kept.index(layer)) >= self.first:
            if position == self.first and layer == position:
                self.states = entering
            if position > self.last:
                self._finish(position)
            else:
                for _ in self.prepare(position, self._partial, self._partial):
                    pass
                pending = position
        wanted = layer < self.target_depth(self.last)
        self.targets = self._set(f"dense-{layer + 1:04d}.states" if wanted else None)
        with self.as_it_was():
            for number, batch in enumerate(self.batches if wanted else []):
                self.targets[number] = self._partial.run(batch, entering[number], layer, layer + 1)
        if pending is not None:
            own = self.kept[pending]
            if self.target_depth(pending) == layer + 1:
                self._held_bytes = 0
                for _ in self.fit(pending, self._partial):
                    pass
                if own != layer:
                    self._stream.release(own)
                pending = None
            elif own == layer:
                self._write(pending)
                self._stream.hold(own)
        return pending

    def _finish(self, position: int) -> None:
        """Take the unseen batches past a layer behind the last one that is corrected."""
        self.advance(position, self._partial)
        entering, self.states = self.states, self._leaving(position)
        for number in self.unseen_numbers:
            self.states[number] = self._run(self._partial, position, number, entering)

    def _commit(
        self, layer: int, pending: int | None, losses: Mapping[int, float] | None = None
    ) -> None:
        """Write what is known once the dense states enter a layer; without states at the end."""

        def name_of(states: Any) -> str | None:
            name: str | None = states.name
            return name

        names = [name_of(states) for states in (self.targets, self.states)]
        branches = {str(count): name_of(states) for count, states in self.branches.items()}
        content: dict[str, Any] = {
            "layer": layer,
            "length": self._partial.length,
            "dense": names[0],
            "pruned": names[1],
            "branches": branches,
            "pending": pending,
            "fits": [dataclasses.asdict(fit) for fit in self.fits],
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "most_features": self.most_features,
            "corrected": {
                str(position): {
                    name: [one.name, one.dtype, one.shape, one.path.name, one.num_bytes]
                    for name, one in tensors.items()
                }
                for position, tensors in self.corrected.items()
            },
        }
        wanted = [*names, *branches.values()]
        if losses is not None:
            content["losses"], wanted = (
                {str(count): str(loss) for count, loss in losses.items()},
                [],
            )
        self._sets.commit([name for name in dict.fromkeys(wanted) if name], **content)

    def _set(self, name: str | None) -> _States:
        return _States(self._sets, name, self.batches, self._partial)

    def _index(self, position: int) -> int:
        return self.kept[position]

    def _leaving(self, position: int, branch: int | None = None) -> BatchStates:
        what = "pruned" if branch is None else f"corrections-{branch}"
        return self._set(f"{what}-{self.kept[position] + 1:04d}.states")

    def _holds(self, output: Tensor, entered: Tensor | None) -> bool:
        """As long as they, and the states that will leave, fit beside what lies in memory."""
        of_output = output.numel() * output.element_size()
        of_both = of_output + (0 if entered is None else entered.numel() * entered.element_size())
        if self._held_bytes + of_both + of_output * len(self.batches) > self._sets.free_bytes:
            return False
        self._held_bytes += of_both
        return True

    def _most_bytes(self) -> int:
        """Of the states that lie on the disk at once, and of all corrected weights."""
        width = int(self.model.config.get_text_config(decoder=True).hidden_size)
        tokens = sum(batch["input_ids"].numel() for batch in self.batches)
        size = self.model.get_input_embeddings().weight.element_size()
        layers = (self.kept[i] for i in range(len(self.kept)) if self.corrects(i))
        maps = [
            one.num_bytes
            for stage in map(self._stream.tensors, layers)
            for one in stage
            if len(one.shape) == 2
        ]
        return 4 * tokens * width * size + sum(maps)

    def _keep(self, position: int) -> None:
        self._write(position)
        if self.corrected.get(position):
            self.positions.append(position)

    def _write(self, position: int) -> None:
        """Write the weights of a layer that were corrected just now."""
        layer = self.kept[position]
        names = {module: name for name, module in self._partial.layers[layer].named_modules()}
        for change in self.changes:
            self.corrected.setdefault(position, {}).update(
                self._written(position, names[change.module], change)
            )
        self.changes = []

    def _written(self, position: int, inside: str, change: Change) -> dict[str, StoredTensor]:
        """The files of a module's changed parameters."""
        layer, path = self.kept[position], find_decoder_layers(self.model).path
        written = {}
        for key, new in change.new.items():
            old = change.old[key]
            if new is None or old is None or torch.equal(new, old):
                continue
            name = f"{inside}.{key}"
            stored = self._stream.stored_as(layer, name)
            if stored is None:
                raise SimdiffError(
                    f"recovery: {path}.{layer}.{name} is stored as a part of something else, so "
                    "that it cannot be replaced in the files: load the model whole (--no-stream)"
                )
            file = self._weights / f"{layer:04d}-{name}"
            flat = new.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            with self._sets.full_disk(), file.open("wb", buffering=0) as output:
                view = bytes_of(flat)
                while view:
                    view = view[output.write(view) :]
                os.fsync(output.fileno())
            written[f"{path}.{position}.{name}"] = StoredTensor(
                stored.name, _NAMES[new.dtype], tuple(new.shape), file, 0, len(flat)
            )
        return written
