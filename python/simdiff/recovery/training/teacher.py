"""The dense model's states for the training text, computed once for each example if they fit."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.models.structure import decoder_body
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.head_loss import Head, linear_head

# Limit of the bytes of last hidden states that are kept for later epochs: 1 million tokens of
# hidden size 576 in bfloat16 take 1.2 GB. Beyond it the dense model reads every example in every
# epoch.
MEMORY_BUDGET = 2 << 30


class Teacher:
    """Provides the dense model's last hidden states, or its logits if its head is not linear.

    Each example is read alone, so that its states are bitwise the same in any batch, and whether
    they were kept or are computed again after an interruption.

    Args:
        model: the dense model, which is not changed.
        examples: the training examples.
        dtype: dtype of the products, and of the kept states.
    """

    def __init__(self, model: PreTrainedModel, examples: Examples, dtype: torch.dtype) -> None:
        """Store the arguments; nothing is read yet."""
        self._model = model
        self._examples = examples
        self._dtype = dtype
        self._device = model.get_input_embeddings().weight.device
        head = linear_head(model, dtype)
        self.head = head or Head()
        self._body = decoder_body(model) if head is not None else None
        width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
        size = examples.num_tokens * width * torch.empty((), dtype=dtype).element_size()
        self.keeps = head is not None and size <= MEMORY_BUDGET
        """Whether the states of an example are kept after it was read."""
        self._kept: dict[int, Tensor] = {}
        self.seconds = 0.0
        """Seconds spent on reading."""
        self.num_read = 0
        """Number of examples read; those whose states are kept are read once."""

    def states(self, indices: Tensor) -> list[Tensor]:
        """The states of each example, `(its length, hidden_size)`, or its logits; see `head`."""
        return [self._state(int(index)) for index in indices]

    def forget(self) -> None:
        """Drop the kept states."""
        self._kept.clear()
        self.seconds, self.num_read = 0.0, 0

    def _state(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index].to(self._device)
        start = time.perf_counter()
        result = self._read(self._examples.take(torch.tensor([index])))
        if self.keeps:  # timed too, since a copy to the host waits for the device
            self._kept[index] = result.cpu()
        self.seconds += time.perf_counter() - start
        self.num_read += 1
        return result

    @torch.no_grad()
    def _read(self, example: Examples) -> Tensor:
        ids = example.tokens.to(self._device)
        with torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32):
            if self._body is None:
                return self._model(input_ids=ids, use_cache=False).logits[0]
            return self._body(input_ids=ids, use_cache=False).last_hidden_state[0].to(self._dtype)
