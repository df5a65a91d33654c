"""Models larger than memory: the weights of one decoder layer at a time, from safetensors files.

The stock loader of transformers does the work: it builds the model on the meta device, is shown all
stored tensors without their values (names, shapes, what it renames, fuses and casts), and is then
given the values of what stays in memory. What it fuses or unpacks of a layer is given to it when
the turn of that layer comes; what it takes as it is goes to its place at once. So a layer is bit
for bit what `from_pretrained` would have made of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.machine import available_memory
from simdiff.io.progress import tell
from simdiff.io.safetensors_header import StoredTensor, read_header, total_bytes
from simdiff.models.division import Division, check_apart, divided, stored_tensors
from simdiff.models.gpu_copies import Event, GpuCopies
from simdiff.models.quantised import Layouts, without_values
from simdiff.models.state_files import OffloadFolder
from simdiff.models.structure import find_decoder_layers
from simdiff.models.tensor_reader import DTYPES, LINE, TensorReader, stamp

_ATTRIBUTE = "_simdiff_stream"
DEFAULT_MEMORY = 2 << 30
"""Bytes of hidden states that are kept in memory."""
_SHARE = 0.9
"""Of the free memory that the weights of a model may take that is not streamed."""


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How the weights and hidden states of a model larger than memory are held."""

    memory: int = DEFAULT_MEMORY
    """Most bytes of hidden states in memory; the others lie in the folder."""
    folder: Path | None = None
    """Where hidden states are kept, so that an interrupted pass goes on; None keeps none."""
    always: bool = False
    """Stream a model that would fit, too."""

    def beside(self, number: int) -> StreamOptions:
        """The same for one more model of a command, whose states lie in a folder of their own.

        Args:
            number: of the model, from 0.
        """
        if self.folder is None or not number:
            return self
        return dataclasses.replace(
            self, folder=self.folder.with_name(f"{self.folder.name}-{number}")
        )

    def is_for(self, directory: Path, dtype: torch.dtype | str, device: str, name: str) -> bool:
        """Whether a model is to be streamed; says so where nobody asked for it.

        Args:
            directory: of the checkpoint.
            dtype: of the weights in memory, or "auto".
            device: where the model will run.
            name: of the model, for people.
        """
        if self.always or device == "auto":
            return self.always
        wanted = _bytes_in_memory(directory, dtype)
        free = available_memory(torch.device(device))
        if free is not None and torch.device(device).type == "cpu":
            free //= ranks.local()[1]
        if free is None or wanted <= _SHARE * free:
            return False
        tell(
            f"Note: {name} is streamed a layer at a time: its weights take {wanted / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free on {device}"
        )
        return True


def _bytes_in_memory(directory: Path, dtype: torch.dtype | str) -> int:
    """Of the weights that lie in a directory; 0 where there are no safetensors files."""
    files = sorted(directory.glob("model*.safetensors"))
    stored = [tensor for file in files for tensor in read_header(file)[1]]
    if not isinstance(dtype, torch.dtype):
        return total_bytes(stored)
    return sum(math.prod(tensor.shape) for tensor in stored) * dtype.itemsize


def chosen_stream(stream: StreamOptions | bool | None) -> StreamOptions | None:
    """The options that an argument of a Python function means.

    True streams, False loads whole, None does what fits.
    """
    if stream is False:
        return None
    return stream if isinstance(stream, StreamOptions) else StreamOptions(always=bool(stream))


def stream_of(model: nn.Module) -> WeightStream | None:
    """What loads the layers of a streamed model; None for every other model."""
    return getattr(model, _ATTRIBUTE, None)


class WeightStream:
    """Loads the layers of a model one after the other; only what lies outside them stays.

    Stage i is decoder layer i; the last stage is the language-model head, which only losses need,
    unless it is tied to the embedding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stages: Mapping[int, Sequence[StoredTensor]],
        names: Mapping[str, str],
        reader: TensorReader,
        fill: Callable[[Mapping[str, Tensor]], None],
        device: torch.device,
        options: StreamOptions,
        layouts: Layouts | None = None,
    ) -> None:
        """See `streamed_model`, which makes it."""
        self.options = options
        self.folder: OffloadFolder | None = None
        """Where the hidden states lie; see `simdiff.models.sweep.offload_folder`."""
        self.watcher: Any = None
        """Sees the layers in a pass of scores; see `simdiff.models.sweep.Watcher`."""
        self.device = device
        self._model, self._stages, self._reader, self._fill = model, stages, reader, fill
        self._names, self._layouts = names, layouts
        self.head = len(find_decoder_layers(model))
        """The stage of the head."""
        self._places = {stage: _meta_places(self._module(stage)) for stage in range(self.head + 1)}
        self._held: set[int] = set()
        self.replaced: dict[str, StoredTensor] = {}
        """What is read in the place of stored tensors, by their names; see `replace`."""
        self._gpu = GpuCopies.of(device)
        self._copied: list[Event] = []
        """Of copies that may still read the reader's memory."""
        self._finished: Event | None = None
        """Comes when the GPU has computed the last stage that was freed."""

    @property
    def bytes_read(self) -> int:
        """Bytes of layers and heads read so far."""
        return self._reader.bytes_read

    @property
    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each weight file by its name."""
        others = {tensor.path for tensor in self.replaced.values()}
        stamps = self._reader.stamps.items()
        return {path.name: found[:2] for path, found in stamps if path not in others}

    def stored_as(self, layer: int, name: str) -> StoredTensor | None:
        """The stored tensor that alone is a parameter of a layer, as it is; None for any other.

        Args:
            layer: its index.
            name: of the parameter within the layer.
        """
        full = f"{find_decoder_layers(self._model).path}.{layer}.{name}"
        found = [tensor for tensor in self._stages[layer] if self._names.get(tensor.name) == full]
        shape = tuple(self._model.get_parameter(full).shape)
        return found[0] if len(found) == 1 and found[0].shape == shape else None

    def replace(self, tensors: Sequence[StoredTensor]) -> None:
        """Read these in the place of those of their names, and no others of an earlier call."""
        self.replaced = {tensor.name: tensor for tensor in tensors}
        self._reader.stamps |= {tensor.path: stamp(tensor.path) for tensor in tensors}

    def hold(self, stage: int) -> None:
        """Keep the weights of the stage that is there now, until `release`."""
        self._held.add(stage)
        for module, name, holder, _ in self._places[stage]:
            _set(module, name, holder, _copied(_entry(module, name)))

    def release(self, stage: int) -> None:
        """Let the weights of a stage go that were held."""
        self._held.remove(stage)
        self._free(stage)

    def num_bytes(self, stage: int) -> int:
        """Stored bytes of a stage."""
        return total_bytes(self.tensors(stage))

    def tensors(self, stage: int) -> list[StoredTensor]:
        """What is read of a stage."""
        return [self.replaced.get(tensor.name, tensor) for tensor in self._stages.get(stage, ())]

    def each(self, stages: Sequence[int]) -> Generator[int, None, None]:
        """Yield stages while their weights are there; the next one is read meanwhile."""
        if self._layouts is not None:
            yield from self._one_by_one(stages)
            return
        loading: Future[Event | None] | None = None
        with ThreadPoolExecutor(1) as ahead:
            try:
                for place, stage in enumerate(stages):
                    loading = loading or ahead.submit(self._load, stage, self._finished)
                    copied = loading.result()
                    loading = None
                    if place + 1 < len(stages):
                        loading = ahead.submit(self._load, stages[place + 1], self._finished)
                    self._hand_over(stage, copied)
                    yield stage
                    self._free(stage)
            finally:
                if loading is not None:
                    loading.cancel()
                ahead.shutdown()
                while self._copied:
                    self._copied.pop().synchronize()
                self._held.clear()
                for stage in stages:
                    self._free(stage)

    def _one_by_one(self, stages: Sequence[int]) -> Generator[int, None, None]:
        """`each` of a quantised model: nothing is read meanwhile.

        The stock loader asks for the state of all modules, which bitsandbytes changes by telling.
        """
        for stage in stages:
            try:
                self._hand_over(stage, self._load(stage, self._finished))
                yield stage
            finally:
                self._free(stage)

    def _module(self, stage: int) -> nn.Module | None:
        if stage < self.head:
            return find_decoder_layers(self._model).modules[stage]
        return self._model.get_output_embeddings() if self._stages.get(stage) else None

    @torch.no_grad()
    def _load(self, stage: int, finished: Event | None = None) -> Event | None:
        """Load a stage; its weights are on a GPU once the event that is returned has come.

        `finished` comes when the GPU has computed the stage before the last one.
        """
        places = self._places[stage]
        if not places:
            return None
        while len(self._copied) > 1:  # the reader has two buffers, and this takes the older one
            self._copied.pop(0).synchronize()
        if self._layouts is not None:
            self._layouts.before(stage)
        self._fill(self._reader.read(self.tensors(stage)))
        if self._layouts is not None:
            self._layouts.after(stage)
        missing = [name for module, name, _, _ in places if _entry(module, name).is_meta]
        if missing:
            raise SimdiffError(f"stage {stage}: {missing[0]} is not in the weight files")
        if self._gpu is None:
            return None
        # Calls return long before a GPU has done what they ask: without waiting here, the weights
        # of all layers that it has not come to would lie there.
        if finished is not None:
            finished.synchronize()
        tensors, copied = self._gpu.to_gpu(_entry(module, name) for module, name, _, _ in places)
        for (module, name, holder, _), tensor in zip(places, tensors, strict=True):
            _set(module, name, holder, tensor)
        self._copied.append(copied)
        return copied

    def _hand_over(self, stage: int, copied: Event | None) -> None:
        """Let what is computed from now on wait for the weights."""
        if self._gpu is not None and copied is not None:
            weights = [_entry(module, name) for module, name, _, _ in self._places[stage]]
            self._gpu.take(weights, copied)

    def _free(self, stage: int) -> None:
        if stage in self._held:
            return
        if self._gpu is not None:
            self._finished = self._gpu.computed()
        if self._layouts is not None and self._places[stage]:
            self._layouts.rest(stage)
        for module, name, holder, meta in self._places[stage]:
            getattr(module, holder)[name] = meta


def _entry(module: nn.Module, name: str) -> Tensor:
    found: Tensor = getattr(module, name)
    return found


def _set(module: nn.Module, name: str, holder: str, value: Tensor) -> None:
    if holder == "_parameters" and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    getattr(module, holder)[name] = value


def _put(model: nn.Module, path: str, value: Tensor) -> None:
    """Make a tensor the parameter or buffer of this name, as the stock loader does."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if name in module._buffers:
        module._buffers[name] = value
    else:
        _set(module, name, "_parameters", nn.Parameter(value, value.is_floating_point()))


def _copied(tensor: Tensor) -> Tensor:
    """A copy that begins at the same place in a line of the cache, see `TensorReader`."""
    if not tensor.is_contiguous():
        return tensor.clone()
    num_bytes = tensor.numel() * tensor.element_size()
    memory = torch.empty(num_bytes + LINE, dtype=torch.uint8, device=tensor.device)
    start = (tensor.data_ptr() - memory.data_ptr()) % LINE
    copy = memory[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _meta_places(module: nn.Module | None) -> list[tuple[nn.Module, str, str, Tensor]]:
    """Where tensors without values are: submodule, name, "_parameters" or "_buffers", tensor."""
    return [
        (part, name, holder, tensor)
        for part in (() if module is None else module.modules())
        for holder in ("_parameters", "_buffers")
        for name, tensor in getattr(part, holder).items()
        if tensor is not None and tensor.is_meta
    ]


def streamed_model(
    kind: type[PreTrainedModel],
    load: Callable[[], tuple[PreTrainedModel, dict[str, Any]]],
    what: str,
    device: torch.device,
    options: StreamOptions,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model whose decoder layers have no weights until `stream_of(model)` loads them.

    Args:
        kind: the stock class.
        load: calls `from_pretrained` of that class, for the CPU.
        what: the model, for messages.
        device: where it will run.
        options: how hidden states are held.

    Returns:
        The model and what loading reported.

    Raises:
        SimdiffError: other files than safetensors, a quantised model, layers that share weights.
    """
    layouts: list[Layouts] = []
    parts: list[tuple[Division, TensorReader, Any]] = []
    stock = kind._load_pretrained_model

    def loader(
        model: PreTrainedModel, _: Any, files: Sequence[str] | None, config: Any, *rest: Any
    ) -> Any:
        stored = stored_tensors(files, config, what)
        quantiser, shows = config.hf_quantizer, config
        if quantiser is not None:
            layouts.append(Layouts(model, quantiser))
            shows = without_values(quantiser, config)
        shown = {
            tensor.name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
            for tensor in stored
        }
        own = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        report = stock(model, shown, None, dataclasses.replace(shows, device_map={"": "meta"}))
        for layout in layouts:
            layout.shown()
        division = divided(model, stored, config, own)
        paths = {tensor.path for tensor in stored}
        casts = {} if layouts else division.casts
        reader = TensorReader(paths, pinned=device.type == "cuda", dtypes=casts)
        stock(model, _mapped(division.resident), None, config)
        parts.append((division, reader, config))
        return report

    with _loading_by(kind, loader):
        model, loading = load()
    division, reader, config = parts[0]
    check_apart(model, what)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    as_they_are = {} if layouts else division.names

    def fill(tensors: Mapping[str, Tensor]) -> None:
        others = {name: one for name, one in tensors.items() if name not in as_they_are}
        for name in tensors.keys() - others.keys():
            _put(model, as_they_are[name], tensors[name])
        if others:  # it walks over the whole model each time, while a layer wants to compute
            stock(model, others, None, config)

    made = WeightStream(
        model, division.stages, division.names, reader, fill, device, options, *layouts
    )
    setattr(model, _ATTRIBUTE, made)
    return model, loading


@contextlib.contextmanager
def _loading_by(kind: type[PreTrainedModel], loader: Callable[..., Any]) -> Iterator[None]:
    """Let `from_pretrained` of a class load its weights by another function."""
    name = "_load_pretrained_model"
    before = kind.__dict__.get(name)
    setattr(kind, name, staticmethod(loader))
    try:
        yield
    finally:
        if before is None:
            delattr(kind, name)
        else:
            setattr(kind, name, before)


def _mapped(tensors: Sequence[StoredTensor]) -> dict[str, Any]:
    """Tensors mapped into memory, of which only what is used takes any: rows of an embedding."""
    files: dict[Path, Any] = {}
    for tensor in tensors:
        if tensor.path not in files:
            files[tensor.path] = safe_open(tensor.path, framework="pt")
    return {tensor.name: files[tensor.path].get_slice(tensor.name) for tensor in tensors}
