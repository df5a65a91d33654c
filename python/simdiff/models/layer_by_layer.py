"""Run one decoder layer of a model at a time, and refuse models in which more happens than that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.foreign import foreign
from simdiff.models.layer_calls import entering, with_entering
from simdiff.models.partial_forward import Course, PartialForward

_FURTHER = object()
"""Stands for what a layer returned beside its hidden states; no layer may be given it."""
_ARGUMENT_BYTES = 256 << 20
"""Of masks, positions and whatever else layers take, that are kept for all batches together."""

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a layer's forward, without the states that enter it."""


class LayerByLayer(PartialForward):
    """A `PartialForward` whose layers run alone, each on states that are given to it.

    Everything that a layer takes beside its hidden states must come from the model itself, and
    nothing may happen to the states between layers; then the states are bit for bit those of the
    whole forward. What the model gives its layers for a batch is kept, up to `_ARGUMENT_BYTES`, so
    that the model makes it once, as in the whole forward, and not for every layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length: int | str | None = "unknown",
        *,
        autocast: bool = False,
    ) -> None:
        """Take the number that `learn` found in an earlier run, if there was one."""
        super().__init__(model, autocast=autocast)
        self._name = type(model).__name__
        self._last: Tensor | None = None
        self._calls: dict[int, tuple[Any, dict[int, Call] | None]] = {}
        """By the id of a batch: itself, and the arguments of each layer if they are kept."""
        self._recording: list[tuple[int, Call]] | None = None
        self._room = _ARGUMENT_BYTES
        self.known = length != "unknown"
        if self.known:
            self._lengths = dict.fromkeys(range(len(self.layers)), length)  # type: ignore[arg-type]

    @property
    def length(self) -> int | None:
        """Length of the tuple that a layer returns; None if it returns a tensor."""
        return self._lengths[0]

    def learn(self) -> None:
        """Find out whether layers return tuples, by two tokens in layer 0, which must be loaded.

        All layers are called from one place, so what one returns all do.
        """
        with torch.no_grad():
            self._run_body({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, Course(stop=1))
        self._lengths = dict.fromkeys(range(len(self.layers)), self._lengths[0])
        self.known = True

    @torch.no_grad()
    def step(self, batch: Mapping[str, Tensor], states: Tensor | None, layer: int) -> Tensor:
        """The states that leave a layer.

        Args:
            batch: the tokens, as `model_inputs` makes them.
            states: what enters the layer; None takes the model's embeddings.
            layer: its index; its weights must be loaded.

        Raises:
            SimdiffError: the layer needs more than its states, or writes over them.
        """
        version = None if states is None or states.is_inference() else states._version
        with foreign(f"{self._name}: layer {layer} cannot run alone", "load the model whole"):
            calls = None if states is None else self._calls_of(batch)
            if calls is None or states is None:
                result = self._run_body(batch, Course(layer, states, layer + 1)).result
            else:
                result = self._called(layer, states, calls[layer])
        if states is not None and version is not None and states._version != version:
            raise SimdiffError(
                f"{self._name}: layer {layer} writes its output over its input, so what entered it "
                "is lost"
            )
        assert result is not None
        return result

    def arguments(
        self, batch: Mapping[str, Tensor], states: Tensor | None, layer: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer is called with for states; see `step`.

        Raises:
            SimdiffError: the model cannot be asked for it without its layers.
        """
        calls = self._calls_of(batch)
        if calls is None:
            raise SimdiffError(
                f"{self._name}: what layer {layer} is called with cannot be known before the "
                "layers run: load the model whole"
            )
        return with_entering(self.embedded(batch) if states is None else states, *calls[layer])

    @contextlib.contextmanager
    def unwrapped(self, layer: int) -> Iterator[nn.Module]:
        """A layer as it was before, whose forward follows no course."""
        module, before = self.layers[layer], self._replaced[layer]
        wrapped = module.__dict__.pop("forward")
        if before is not None:
            module.forward = before
        try:
            yield module
        finally:
            module.forward = wrapped

    def _called(self, layer: int, states: Tensor, call: Call) -> Tensor:
        """What a layer makes of states, with the arguments that the model had for it."""
        self._last = states  # as in the whole forward, where nothing happens between layers
        args, kwargs = with_entering(states, *call)
        with self._precision(states.device):
            output = self.layers[layer].forward(*args, **kwargs)
        result: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return result

    def _calls_of(self, batch: Mapping[str, Tensor]) -> dict[int, Call] | None:
        """What every layer is given for a batch; None where the model has to be asked each time."""
        if id(batch) not in self._calls:
            self._calls[id(batch)] = batch, self._recorded(batch)
        return self._calls[id(batch)][1]

    def _recorded(self, batch: Mapping[str, Tensor]) -> dict[int, Call] | None:
        """Let the model pass a batch by all its layers, and keep what it gives them."""
        if self._room <= 0:
            return None
        self._recording = []
        try:
            self._run_body(batch, Course(start=len(self.layers)))
        finally:
            found, self._recording = self._recording, None
        tensors = {one.untyped_storage().data_ptr(): one for one in _tensors(found)}
        num_bytes = sum(one.untyped_storage().nbytes() for one in tensors.values())
        once_each = [index for index, _ in found] == list(range(len(self.layers)))
        if not once_each or num_bytes > self._room:
            return None
        self._room -= num_bytes
        return dict(found)

    def _part(
        self, batch: Mapping[str, Tensor], states: Tensor | None, start: int, stop: int
    ) -> Tensor | None:
        if start == stop:
            return self.embedded(batch)
        assert stop == start + 1
        return self.step(batch, states, start)

    @torch.no_grad()
    def embedded(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The states that enter layer 0."""
        result = self._run_body(batch, Course(stop=0)).result
        assert result is not None
        return result

    def _probe(self) -> None:
        """Nothing: the layers have no weights yet; see `learn`."""

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        inner = super()._wrapped(index, self._checked(index, forward))

        def alone(*args: Any, **kwargs: Any) -> Any:
            if index and entering(index, args, kwargs) is not self._last:
                raise SimdiffError(
                    f"{self._name} changes the hidden states between layers {index - 1} and "
                    f"{index}, so that layers cannot run one at a time: load the model whole"
                )
            if any(value is _FURTHER for value in (*args, *kwargs.values())):
                raise self._shares(index - 1)
            if self._recording is not None:
                self._recording.append((index, with_entering(torch.empty(0), args, kwargs)))
            output = inner(*args, **kwargs)
            several = isinstance(output, (tuple, list))
            self._last = output[0] if several else output
            # Such as attention weights, which nobody asked for.
            return (self._last, *[_FURTHER] * (len(output) - 1)) if several else output

        return alone

    def _checked(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that must give nothing to later layers but its states."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            before = _contents(args, kwargs)
            output = forward(*args, **kwargs)
            if _contents(args, kwargs) != before:
                raise self._shares(index)
            return output

        return checked

    def _shares(self, index: int) -> SimdiffError:
        return SimdiffError(
            f"{self._name}: layer {index} passes more than its hidden states on to later layers "
            "(such as shared keys and values), so that layers cannot run one at a time: load the "
            "model whole"
        )


def _contents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
    """What lies in the lists and mappings among a layer's arguments."""
    return [
        tuple(map(id, value.values() if isinstance(value, Mapping) else value))
        for value in (*args, *kwargs.values())
        if isinstance(value, (dict, list, Mapping))
    ]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)
