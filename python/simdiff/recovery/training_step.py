"""One step of training: losses and gradients of a batch, and the update of the adapters."""

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
from simdiff.models import decoder_body
from simdiff.recovery.fine_tuning_options import FineTuningOptions
from simdiff.recovery.head_loss import Head, HeadLoss, head_loss, linear_head
from simdiff.recovery.lora import Adapters
from simdiff.recovery.teacher import Teacher
from simdiff.recovery.training_data import Examples, batch_indices
from simdiff.recovery.training_state import TrainingState, random_states, set_random_states


class Student:
    """A model with adapters that learn.

    Args:
        model: changed in place until `finish` or `discard`.
        train: examples to learn from.
        options: of the training.
        teacher: the dense model; used where the options ask for distillation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train: Examples,
        options: FineTuningOptions,
        teacher: PreTrainedModel | None,
    ) -> None:
        """Put the adapters in."""
        self.model, self.train, self._options = model, train, options
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype = compute_dtype(model, options.compute_dtype)
        head = linear_head(model, self.dtype)  # before there are adapters
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
            Mean loss over the predicted tokens, in nats, and the number of tokens read; no loss
            where it or the gradient was NaN or Inf: then nothing was updated.
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
        """Add up the gradients of a step's batch; returns mean loss and tokens."""
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
        """How many steps fit, told by the time of one; reading by the teacher is counted apart."""
        before, batch_size = random_states(self.device), self._options.batch_size
        for step in (0, 1):  # the first one is slower: memory and kernels are set up
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

        low, high = 0, most  # the largest number that fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle) <= seconds else (low, middle - 1)
        return low

    def remember(self, state: TrainingState) -> None:
        """Put into a state what the next step depends on."""
        state.adapters = self.adapters.state()
        state.optimizer = self.optimizer.state_dict()
        state.random = random_states(self.device)

    def finish(self, adapters: Mapping[str, Tensor]) -> None:
        """Merge these adapters; the model is an ordinary one again."""
        self.adapters.load(adapters)
        self.adapters.merge()
        self._leave()

    def discard(self) -> None:
        """Take the adapters out again."""
        self.adapters.remove()
        self._leave()

    def _leave(self) -> None:
        if self._options.gradient_checkpointing:
            _checkpointing(self.model, "disable")()
        self.model.eval()

    def _loss(self, batch: Examples, indices: Tensor | None) -> HeadLoss:
        """Over a batch; against the teacher where the indices of training examples are given."""
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
    """transformers 5 renames the methods: the new name where there is one."""
    old: Callable[..., None] = getattr(model, f"gradient_checkpointing_{verb}")
    return getattr(model, f"activation_checkpointing_{verb}", old)


def compute_dtype(model: PreTrainedModel, wanted: str) -> torch.dtype:
    """Of the products in training; adapters and their optimizer are float32 whatever it is.

    Raises:
        SimdiffError: float32 for weights of 16 bits.
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    if wanted == "float32":
        if half:
            raise SimdiffError(
                f"fine-tuning: compute_dtype float32 needs a model in float32, got {model.dtype}: "
                "load it with --dtype float32"
            )
        return torch.float32
    if wanted == "bfloat16" or half:
        return torch.bfloat16
    if model.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Instructions for it, not only an emulation, which is slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
