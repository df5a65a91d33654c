"""One step of training: losses and gradients of a batch, and the update of what is trained."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.structure import decoder_body, text_config
from simdiff.recovery.training.data import Examples, batch_indices
from simdiff.recovery.training.example_states import ExampleStates
from simdiff.recovery.training.few_logits import FewLogits
from simdiff.recovery.training.head_loss import Head, HeadLoss, head_loss, linear_head
from simdiff.recovery.training.last_layers import LastLayers
from simdiff.recovery.training.lora import Adapters
from simdiff.recovery.training.options import FineTuningOptions
from simdiff.recovery.training.state import TrainingState, random_states, set_random_states
from simdiff.recovery.training.teacher import SharedStart, Teacher, layers_shared


class Trained(Protocol):
    """The parameters of a model that are trained: adapters, or the model's own."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules or parameters of the model that it changes."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, float32."""

    def state(self) -> dict[str, Tensor]:
        """A copy of them on the CPU."""

    def load(self, state: Mapping[str, Tensor], /) -> None:
        """Set them to a copy."""

    def merge(self) -> PreTrainedModel:
        """Make an ordinary model with what was learnt."""

    def remove(self) -> PreTrainedModel:
        """Make the model what it was before."""


class Student:
    """A model in training.

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
        """Put what is trained into the model."""
        self.model, self.train, self._options = model, train, options
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype = compute_dtype(model, options.compute_dtype)
        head = linear_head(model, self.dtype)  # must precede what is trained
        self._frozen_head = head or Head()
        self._body = decoder_body(model) if head is not None else model
        self._few: FewLogits | None = None
        count = options.few_logits
        if count and head is not None and head.weight is not None and count < len(head.weight):
            self._few = FewLogits(train, len(head.weight), count)
        distils = options.distillation is not None and teacher is not None
        self.teacher = Teacher(teacher, train, self.dtype) if distils and teacher else None
        self.trained: Trained
        self._last: LastLayers | None = None
        if options.last_layers is None:
            single = self.dtype == torch.float32
            self.trained = Adapters(model, options.lora, cast_inputs=single)
        else:
            self.trained = self._last = LastLayers(model, options.last_layers, self.dtype)
        self._prefixes: dict[int, ExampleStates] = {}
        self._shared: SharedStart | None = None
        self._ending = contextlib.ExitStack()
        if options.gradient_checkpointing:
            _checkpointing(model, "enable")({"use_reentrant": False})
        self._parameters = list(self.trained.parameters().values())
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        self.step_seconds = math.nan
        if teacher is not None and self.teacher is not None and self.teacher.keeps:
            self._share(teacher)

    def _share(self, dense: PreTrainedModel) -> None:
        """Run the layers that are the dense model's own once, for the teacher and the student."""
        last, prefix = self._last, self._prefix(self.train)
        if last is None or prefix is None or not prefix.keeps or self.teacher is None:
            return
        layer = min(last.first, layers_shared(self.model, dense))
        if layer:
            self._shared = SharedStart(layer, lambda example: last.entering(example.tokens, layer))
            self._ending.enter_context(self.teacher.begin_with(self._shared))

    def step(self, step: int, learning_rate: float) -> tuple[float | None, int]:
        """Update what is trained once.

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
            with self._entering(self.train, part):
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
            with self._entering(examples, part):
                total += self._loss(examples.take(part), None).cross_entropy
        return total / int(examples.counted.sum())

    def steps_within(self, seconds: float, most: int) -> int:
        """The number of steps that fit into a time, by timing one; what is read once apart."""
        before, batch_size = random_states(self.device), self._options.batch_size
        for step in (0, 1):  # the first step is slower, since it allocates memory and loads kernels
            for reader in self._readers():
                reader.forget()
            start = time.perf_counter()
            self.gradients(step)
            self._synchronise()
            self.step_seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        set_random_states(before, self.device)
        readers = self._readers()
        alone = max(0.0, self.step_seconds - sum(reader.seconds for reader in readers))

        def needed(steps: int) -> float:
            read = steps * batch_size
            return steps * alone + sum(reader.seconds_for(read) for reader in readers)

        low, high = 0, most  # bisection for the largest number that fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle) <= seconds else (low, middle - 1)
        return low

    def remember(self, state: TrainingState) -> None:
        """Copy everything on which the next step depends into a state."""
        state.weights = self.trained.state()
        state.optimizer = self.optimizer.state_dict()
        state.random = random_states(self.device)

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """Merge the given weights, after which the model is an ordinary one."""
        self.trained.load(weights)
        self.trained.merge()
        self._leave()

    def discard(self) -> None:
        """Make the model what it was before training."""
        self.trained.remove()
        self._leave()

    def _leave(self) -> None:
        self._ending.close()
        if self._options.gradient_checkpointing:
            _checkpointing(self.model, "disable")()
        self.model.eval()

    def read(self, examples: Examples) -> None:
        """Read what is kept of examples, so that it is there when they are asked for."""
        if (prefix := self._prefix(examples)) is not None and prefix.keeps:
            prefix.states(torch.arange(len(examples)))

    def _prefix(self, examples: Examples) -> ExampleStates | None:
        """The states that enter the first trained layer; None if that is the first of all."""
        last = self._last
        if last is None or last.first == 0:
            return None
        if id(examples) not in self._prefixes:
            size = getattr(text_config(self.model), "hidden_size", 0) * self.model.dtype.itemsize

            def states_of(example: Examples) -> Tensor:
                if self._shared is None or examples is not self.train:
                    return last.entering_first(example.tokens)[0]
                start = self._shared(example)
                return last.entering_first(example.tokens, start, self._shared.layer)[0]

            prefix = ExampleStates(states_of, examples, size, self.device)
            self._prefixes[id(examples)] = prefix
        return self._prefixes[id(examples)]

    def _readers(self) -> list[ExampleStates]:
        """What reads the examples to train on, if anything does."""
        return [reader for reader in (self.teacher, self._prefix(self.train)) if reader is not None]

    @contextlib.contextmanager
    def _entering(self, examples: Examples, part: Tensor) -> Iterator[None]:
        """Forwards and backwards of a part of the examples begin where the training does."""
        prefix = self._prefix(examples)
        if prefix is None or self._last is None:
            yield
            return
        states = nn.utils.rnn.pad_sequence(prefix.states(part), batch_first=True)
        with self._last.starting_from(states):
            yield

    def _head(self) -> Head:
        """The head, in the dtype of products; its weight as it is now, where that is trained."""
        module = self.model.get_output_embeddings()
        if self._frozen_head.weight is None or not module.weight.requires_grad:
            return self._frozen_head
        bias = None if module.bias is None else module.bias.to(self.dtype)
        return Head(module.weight.to(self.dtype), bias)

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
        head = self._head()
        rows = states[:, :-1][counted].to(head.device or states.device)
        labels = ids[:, 1:].to(states.device)[counted].to(rows.device)
        few = None if self._few is None or indices is None else self._few.draw(labels)
        if few is not None:
            head, labels = few.of(head), few.labels
        if self.teacher is None or indices is None:
            return head_loss(rows, labels, head)
        known = self.teacher.states(indices)
        wanted = torch.cat(
            [
                s[:-1][row[: len(s) - 1].to(s.device)].to(rows.device)
                for s, row in zip(known, counted, strict=True)
            ]
        )
        taught = self.teacher.head if few is None else few.of(self.teacher.head)
        return head_loss(rows, labels, head, wanted, taught, self._options.distillation)

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
    """The dtype of products in training; what is trained and its optimizer are always float32.

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
