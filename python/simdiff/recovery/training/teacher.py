"""The dense model's states for the training text, which distillation learns from.

Where a model is trained from some layer on, its first layers are the dense model's own: they run
once for both (`SharedStart`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.models.partial_forward import Course, PartialForward
from simdiff.models.structure import decoder_body, find_decoder_layers, text_config
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.example_states import ExampleStates
from simdiff.recovery.training.head_loss import Head, linear_head


class SharedStart:
    """The states that enter the first layer in which two models differ, read once for both.

    Each of the two asks for an example once.

    Args:
        layer: that layer.
        read: computes the states `(1, length, hidden_size)` of an example.
    """

    def __init__(self, layer: int, read: Callable[[Examples], Tensor]) -> None:
        """Store the arguments; nothing is read yet."""
        self.layer, self._read = layer, read
        self._held: dict[bytes, Tensor] = {}

    def __call__(self, example: Examples) -> Tensor:
        """The states; they are held until the other model asks for them."""
        key = example.tokens.numpy().tobytes()
        if key in self._held:
            return self._held.pop(key)
        self._held[key] = states = self._read(example)
        return states


def layers_shared(model: PreTrainedModel, dense: PreTrainedModel) -> int:
    """How many of the first layers have the same parameters in both models, not copies."""
    if model.get_input_embeddings().weight is not dense.get_input_embeddings().weight:
        return 0
    count = 0
    for pair in zip(*(find_decoder_layers(one).modules for one in (model, dense)), strict=False):
        own, other = ({id(p) for p in layer.parameters()} for layer in pair)
        if own != other:
            break
        count += 1
    return count


class Teacher(ExampleStates):
    """Provides the dense model's last hidden states, or its logits if its head is not linear.

    Args:
        model: the dense model, which is not changed.
        examples: the training examples.
        dtype: dtype of the products, and of the kept states.
    """

    def __init__(self, model: PreTrainedModel, examples: Examples, dtype: torch.dtype) -> None:
        """Store the arguments; nothing is read yet."""
        self._model, self._dtype = model, dtype
        self._start: tuple[SharedStart, PartialForward] | None = None
        head = linear_head(model, dtype)
        self.head = head or Head()
        self._body = decoder_body(model) if head is not None else None
        size = getattr(text_config(model), "hidden_size", 0) * dtype.itemsize
        device = model.get_input_embeddings().weight.device
        super().__init__(self._states_of, examples, None if head is None else size, device)

    def begin_with(self, start: SharedStart) -> PartialForward:
        """Begin with the states of `start`; the runner that is returned must be entered by then."""
        runner = PartialForward(self._model, autocast=self._dtype != torch.float32)
        self._start = start, runner
        return runner

    def _from(self, example: Examples) -> contextlib.AbstractContextManager[None]:
        if self._start is None:
            return contextlib.nullcontext()
        start, runner = self._start
        return runner.following(Course(start.layer, start(example)))

    @torch.no_grad()
    def _states_of(self, example: Examples) -> Tensor:
        ids = example.tokens.to(self._device)
        half = self._dtype != torch.float32
        with self._from(example), torch.autocast(self._device.type, self._dtype, half):
            if self._body is None:
                return self._model(input_ids=ids, use_cache=False).logits[0]
            return self._body(input_ids=ids, use_cache=False).last_hidden_state[0].to(self._dtype)
