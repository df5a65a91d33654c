"""One step of training: the losses and gradients of a batch, and the update of the adapters."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.structure import decoder_body
from simdiff.recovery.training.data import Examples, batch_indices
from simdiff.recovery.training.head_loss import Head, HeadLoss, head_loss, linear_head
from simdiff.recovery.training.lora import Adapters
from simdiff.recovery.training.options import FineTuningOptions
from simdiff.recovery.training.state import TrainingState, random_states, set_random_states
from simdiff.recovery.training.teacher import Teacher


class Student:
    """A model with adapters in training.

    Args:
        model: the model, which is changed in place until `finish` or `discard`.
        train: examples to train on.
        options: options of the training.
        teacher: the dense model, used only for distillation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train: Examples,
        options: FineTuningOptions,
        teacher: PreTrainedModel | None,
    ) -> None:
        """Insert the adapters."""
        self.model, self.train, self._options = model, train, options
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype = compute_dtype(model, options.compute_dtype)
        head = linear_head(model, self.dtype)  # must precede the adapters
        self._head = head or Head()
        self._body = decoder_body(model) if head is not None else model
        distils = options.distillation is not None and teacher is not None
        self.teacher = Teacher(teacher, train, self.dtype) if distils and teacher else None
        self.adapters = Adapters(model, options.lora, cast_inputs=self.dtype == torch.float32)
        if options.gradient_checkpointing:
            _checkpointing(model, "enable")({"use_reentrant": False})
        self._parameters = list(self.adapters.parameters().values())
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        self.step_seconds = math.nan

    def step(self, step: int, learning_rate: float) -> tuple[float | None, int]:
        """Update the adapters once.

        Returns:
            Mean loss over the predicted tokens, in nats, and the number of tokens read. The loss is
            None, and nothing is updated, if it or the gradient is NaN or Inf.
        """
        loss, tokens = self.gradients(step)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._options.max_gradient_norm)
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            self.optimizer.zero_grad()
            return None, tokens
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, tokens

    def gradients(self, step: int) -> tuple[float, int]:
        """Sum the gradients over a step's batch; return the mean loss and the number of tokens."""
        options = self._options
        self.model.train()
        indices = batch_indices(len(self.train), options.batch_size, step, options.seed)
        count = int(self.train.counted[indices].sum())
        total = 0.0
        for part in indices.split(options.micro_batch_size):
            loss = self._loss(self.train.take(part), part).loss
            (loss / count).backward()
            total += float(loss.detach())
        return total / count, int(self.train.mask[indices].sum())

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> float:
        """Mean cross-entropy of the predicted tokens, in nats; may be NaN or Inf."""
        self.model.eval()
        total = 0.0
        for part in torch.arange(len(examples)).split(self._options.micro_batch_size):
            total += self._loss(examples.take(part), None).cross_entropy
        return total / int(examples.counted.sum())

    def steps_within(self, seconds: float, most: int) -> int:
        """The number of steps that fit into a time, by timing one; the teacher is timed apart."""
        before, batch_size = random_states(self.device), self._options.batch_size
        for step in (0, 1):  # the first step is slower, since it allocates memory and loads kernels
            if self.teacher is not None:
                self.teacher.forget()
            start = time.perf_counter()
            self.gradients(step)
            self._synchronise()
            self.step_seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        set_random_states(before, self.device)
        if self.teacher is None:
            return min(most, int(seconds / self.step_seconds))
        reading = self.teacher.seconds / max(1, self.teacher.num_read)
        alone = max(0.0, self.step_seconds - self.teacher.seconds)

        def needed(steps: int) -> float:
            read = steps * batch_size
            return steps * alone + reading * (
                min(read, len(self.train)) if self.teacher and self.teacher.keeps else read
            )

        low, high = 0, most  # bisection for the largest number that fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle) <= seconds else (low, middle - 1)
        return low

    def remember(self, state: TrainingState) -> None:
        """Copy everything on which the next step depends into a state."""
        state.adapters = self.adapters.state()
        state.optimizer = self.optimizer.state_dict()
        state.random = random_states(self.device)

    def finish(self, adapters: Mapping[str, Tensor]) -> None:
        """Merge the given adapters, after which the model is an ordinary one."""
        self.adapters.load(adapters)
        self.adapters.merge()
        self._leave()

    def discard(self) -> None:
        """Remove the adapters without merging them."""
        self.adapters.remove()
        self._leave()

    def _leave(self) -> None:
        if self._options.gradient_checkpointing:
            _checkpointing(self.model, "disable")()
        self.model.eval()

    def _loss(self, batch: Examples, indices: Tensor | None) -> HeadLoss:
        """The loss of a batch; with indices of training examples, including that to the teacher."""
        ids, counted = batch.tokens.to(self.device), batch.counted[:, 1:]
        inputs: dict[str, Any] = {"input_ids": ids}
        if not bool(batch.mask.all()):
            inputs["attention_mask"] = batch.mask.long().to(self.device)
        with self._precision():
            output = self._body(**inputs, use_cache=False)
        states = output.logits if self._body is self.model else output.last_hidden_state
        counted = counted.to(states.device)
        rows = states[:, :-1][counted].to(self._head.device or states.device)
        labels = ids[:, 1:].to(states.device)[counted].to(rows.device)
        if self.teacher is None or indices is None:
            return head_loss(rows, labels, self._head)
        known = self.teacher.states(indices)
        wanted = torch.cat(
            [
                s[:-1][row[: len(s) - 1].to(s.device)].to(rows.device)
                for s, row in zip(known, counted, strict=True)
            ]
        )
        return head_loss(
            rows, labels, self._head, wanted, self.teacher.head, self._options.distillation
        )

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _checkpointing(model: PreTrainedModel, verb: str) -> Callable[..., None]:
    """The method of a model that switches gradient checkpointing; transformers 5 renames it."""
    old: Callable[..., None] = getattr(model, f"gradient_checkpointing_{verb}")
    return getattr(model, f"activation_checkpointing_{verb}", old)


def compute_dtype(model: PreTrainedModel, wanted: str) -> torch.dtype:
    """The dtype of products in training; adapters and their optimizer are always float32.

    Raises:
        SimdiffError: float32 is wanted for weights of 16 bits.
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    if wanted == "float32":
        if half:
            raise SimdiffError(
                f"fine-tuning: compute_dtype float32 needs a model in float32, got {model.dtype}: "
                "load it with dtype='float32'"
            )
        return torch.float32
    if wanted == "bfloat16" or half:
        return torch.bfloat16
    if model.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # The CPU must have bfloat16 instructions: an emulation is slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
