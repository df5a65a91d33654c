"""Run part of a model: skip layers, start from given hidden states, or stop early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.layer_calls import entering, with_entering
from simdiff.models.running import evaluating
from simdiff.models.structure import decoder_body, find_decoder_layers


@dataclass
class Course:
    """Tells a forward which decoder layers to skip, where to start and where to stop."""

    start: int = 0
    """Layers before this one are skipped: they return the state that enters them."""
    states: Tensor | None = None
    """The hidden states that enter layer `start`; None leaves those of the model. With all layers
    skipped they are those that leave the last one."""
    stop: int | None = None
    """The forward ends after layer `stop - 1`; None runs it to its own end."""
    passed_by: frozenset[int] = frozenset()
    """Further layers that are skipped."""
    kept: dict[int, tuple[Tensor, int] | None] = field(default_factory=dict)
    """For each layer among its keys, the forward stores the state that enters it and that tensor's
    version, which counts in-place writes."""
    result: Tensor | None = None
    """The state that leaves layer `stop - 1`, once the forward has stopped there."""


class PartialForward:
    """Context manager that runs a model's own forward along a `Course`.

    The model itself makes masks, positions and everything else that its layers take. Inside the
    with block every layer's `forward` is replaced; at its end each is restored.

    Args:
        model: causal language model.
        autocast: in `run`, compute matrix products of a float32 model in bfloat16; the hidden
            states stay float32.

    Usage::

        with PartialForward(model) as partial:
            states = partial.run({"input_ids": ids}, None, 0, 4)  # the state that leaves layer 3
            states = partial.run({"input_ids": ids}, states, 4, 8)

    Raises:
        SimdiffError: no decoder layers found.
    """

    def __init__(self, model: PreTrainedModel, *, autocast: bool = False) -> None:
        """Find the layers; the model is changed only inside the with block."""
        self.model = model
        self.layers: nn.ModuleList = find_decoder_layers(model).modules
        self.layers_run = 0
        """Number of layers run so far, including the first forward on two tokens."""
        self._body = decoder_body(model)
        self._autocast = autocast
        self._replaced: list[Any] = []
        self._state = contextlib.ExitStack()
        self._course = Course()
        self._lengths: dict[int, int | None] = {}
        """Length of the tuple that each layer returns; None if it returns a tensor."""

    def __enter__(self) -> PartialForward:
        """Replace the layers' `forward`."""
        self._state.enter_context(evaluating(self.model))
        self._replaced = [layer.__dict__.get("forward") for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = self._wrapped(index, layer.forward)
        try:
            if not self._lengths:
                self._probe()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _probe(self) -> None:
        """Run two tokens: whether a layer returns a tuple shows only when it runs."""
        with torch.no_grad():
            self._run_body({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, Course())

    def __exit__(self, *_: object) -> None:
        """Put every `forward` back as it was."""
        for layer, forward in zip(self.layers, self._replaced, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
        self._state.close()

    @contextlib.contextmanager
    def following(self, course: Course) -> Iterator[None]:
        """Inside the with block, forwards of the model follow `course`."""
        self._course = course
        try:
            yield
        finally:
            self._course = Course()

    @torch.no_grad()
    def run(
        self, batch: Mapping[str, Tensor], states: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """Run layers `start` to `stop - 1`; return the states `(batch, sequence, hidden_size)`.

        Args:
            batch: the tokens to which the states belong, as `model_inputs` makes them.
            states: the states that enter layer `start`; None takes the model's embeddings.
            start, stop: the layers, 0 <= start <= stop.

        Raises:
            SimdiffError: a layer returns something other than one tensor of that shape, or NaN.
        """
        if start == stop and states is not None:
            return states
        result = self._part(batch, states, start, stop)
        shape = tuple(batch["input_ids"].shape)
        if result is None or result.dim() != 3 or tuple(result.shape[:2]) != shape:
            found = "none" if result is None else tuple(result.shape)
            raise SimdiffError(
                f"recovery needs hidden states {(*shape, 'hidden_size')} between the layers of "
                f"{type(self.model).__name__}, got {found}"
            )
        if not bool(torch.isfinite(result).all()):
            raise SimdiffError(
                f"recovery: hidden states must be finite, got NaN or Inf among those that enter "
                f"layer {stop} of {len(self.layers)}"
            )
        return result

    def _part(
        self, batch: Mapping[str, Tensor], states: Tensor | None, start: int, stop: int
    ) -> Tensor | None:
        return self._run_body(batch, Course(start, states, stop)).result

    @torch.no_grad()
    def entering(
        self, ids: Tensor, layers: Collection[int], passed_by: frozenset[int]
    ) -> dict[int, tuple[Tensor, int]]:
        """The states that enter some layers while others are skipped, with their tensor versions.

        Args:
            ids: token ids `(batch, sequence)`.
            layers: indices of the layers, at least one.
            passed_by: layers that are skipped.
        """
        last = max(layers)
        course = Course(stop=last, passed_by=passed_by, kept=dict.fromkeys(layers))
        self._run_body({"input_ids": ids}, course)
        if course.kept[last] is None and course.result is not None:  # the layer before it ended it
            course.kept[last] = (course.result, course.result._version)
        return {layer: found for layer, found in course.kept.items() if found is not None}

    @torch.no_grad()
    def entering_module(
        self, batch: Mapping[str, Tensor], states: Tensor, layer: int, name: str
    ) -> Tensor:
        """The tensor that enters a module of a layer; the forward ends there.

        Args:
            batch, states: see `run`; the states enter the layer.
            layer: its index.
            name: of the module within the layer.
        """
        found: list[Tensor] = []

        def end(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _Reached

        handle = self.layers[layer].get_submodule(name).register_forward_pre_hook(end)
        try:
            with contextlib.suppress(_Reached):
                self._part(batch, states, layer, layer + 1)
        finally:
            handle.remove()
        return found[0]

    def _run_body(self, batch: Mapping[str, Tensor], course: Course) -> Course:
        """Run a forward along a course, without the language-model head."""
        device = self.model.get_input_embeddings().weight.device
        keywords = {name: value.to(device) for name, value in batch.items()}
        with self.following(course), contextlib.suppress(_Reached), self._precision(device):
            self._body(**keywords, use_cache=False)
        return course

    def _precision(self, device: torch.device) -> Any:
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def partial(*args: Any, **kwargs: Any) -> Any:
            course = self._course
            states = entering(index, args, kwargs)
            if index == course.start and course.states is not None:
                states = course.states
                args, kwargs = with_entering(states, args, kwargs)
            if index in course.kept:
                course.kept[index] = (states, states._version)
            if course.stop is not None and course.stop <= index:
                course.result = states
                raise _Reached
            if index + 1 == course.start == len(self.layers) and course.states is not None:
                states = course.states  # no layer is left to give them to
            if index < course.start or index in course.passed_by:
                length = self._lengths[index]
                return states if length is None else (states, *[None] * (length - 1))
            output = forward(*args, **kwargs)
            self.layers_run += 1
            several = isinstance(output, (tuple, list))
            self._lengths[index] = len(output) if several else None
            if course.stop == index + 1:
                course.result = output[0] if several else output
                raise _Reached
            return output

        return partial


class _Reached(BaseException):
    """The place at which a forward ends; no error, and not to be taken for one on its way."""
