"""The dense model's states for the training text, which distillation learns from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.models.structure import decoder_body, text_config
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.example_states import ExampleStates
from simdiff.recovery.training.head_loss import Head, linear_head


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
        head = linear_head(model, dtype)
        self.head = head or Head()
        self._body = decoder_body(model) if head is not None else None
        size = getattr(text_config(model), "hidden_size", 0) * dtype.itemsize
        device = model.get_input_embeddings().weight.device
        super().__init__(self._states_of, examples, None if head is None else size, device)

    @torch.no_grad()
    def _states_of(self, example: Examples) -> Tensor:
        ids = example.tokens.to(self._device)
        with torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32):
            if self._body is None:
                return self._model(input_ids=ids, use_cache=False).logits[0]
            return self._body(input_ids=ids, use_cache=False).last_hidden_state[0].to(self._dtype)
