"""The loss of a language model from its last hidden states, with few tokens' logits at a time.

For a token with logits z, the token y that follows and, if there is a dense model to learn from,
its logits t:

    loss = (1 − w) CE(y, softmax z) + w T² KL(softmax(t / T) ‖ softmax(z / T))
    ∂loss / ∂z = (1 − w) (softmax z − 1_y) + w T (softmax(z / T) − softmax(t / T))

over the whole vocabulary (Hinton et al. 2015, arXiv 1503.02531, section 2). The gradients of the
head's input, and of a head that is trained, are computed together with the loss: logits exist for a
few tokens at a time (`ROWS`) and are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.structure import decoder_body

# Number of tokens whose logits exist at a time, by device. With fewer tokens the head's weights are
# read more often. On a CPU the logits of 64 tokens in float32 take 12 MB for a vocabulary of 49152,
# and those of 256 do not fit the cache. A GPU reads a weight of 2 bytes for 2 flops per token. By
# the data sheets an A100 does 153 flops in the time of a byte, an H200 206, an H100 295: with fewer
# tokens the products wait for memory.
ROWS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True)
class Head:
    """A linear map to logits; without a weight its inputs are logits."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def device(self) -> torch.device | None:
        """Device of the weight; None without a weight."""
        return None if self.weight is None else self.weight.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of states `(num_tokens, hidden_size)`, in float32, or float64 for such weights."""
        if self.weight is not None:
            hidden = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return hidden if hidden.dtype == torch.float64 else hidden.float()

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of the head's input, from the gradient of the logits."""
        return gradient if self.weight is None else gradient.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True)
class Distillation:
    """The part of the loss that is the divergence from the dense model's predictions."""

    weight: float = 1.0
    """Weight of the divergence, 0 to 1; the rest is the weight of the text's cross-entropy."""
    temperature: float = 1.0

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            SimdiffError: the weight is outside [0, 1], or the temperature is not positive.
        """
        if not 0 <= self.weight <= 1:
            raise SimdiffError(f"distillation: weight must be 0 to 1, got {self.weight}")
        if not 0 < self.temperature < float("inf"):
            raise SimdiffError(f"distillation: temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True)
class HeadLoss:
    """Sums over the tokens of a batch, in nats."""

    loss: Tensor
    """The differentiable loss that is minimised."""
    cross_entropy: float
    """Cross-entropy of the text, also if the loss has other parts."""


@torch.inference_mode()
def linear_head(model: PreTrainedModel, dtype: torch.dtype) -> Head | None:
    """The head of a model; None if it is not a plain linear map of the body's last states.

    Scaled or capped logits are detected by computing a few logits both ways, which must be equal.

    Args:
        model: a causal language model.
        dtype: dtype in which the head multiplies.
    """
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        return None
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    states = decoder_body(model)(input_ids=ids, use_cache=False).last_hidden_state
    wanted = model(input_ids=ids, use_cache=False).logits
    found = module(states.to(module.weight.device))
    if found.shape != wanted.shape or not torch.equal(found, wanted):
        return None
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    return Head(module.weight.detach().to(dtype), bias)


def head_loss(
    states: Tensor,
    labels: Tensor,
    head: Head,
    teacher_states: Tensor | None = None,
    teacher_head: Head | None = None,
    distillation: Distillation | None = None,
) -> HeadLoss:
    """The loss of predicting `labels`, differentiable in `states`, and in a head that is trained.

    Args:
        states: inputs of the head `(num_tokens, hidden_size)`, or logits.
        labels: the token that follows each token, `(num_tokens,)`.
        head: see `linear_head`.
        teacher_states, teacher_head: states and head of the dense model, for the same tokens.
        distillation: None, or no teacher, gives the cross-entropy alone.
    """
    teacher = None
    if distillation is not None and distillation.weight > 0 and teacher_states is not None:
        teacher = (teacher_states, teacher_head or Head(), distillation)
    loss, entropy = _HeadLoss.apply(states, head.weight, head.bias, labels, teacher)
    return HeadLoss(loss, float(entropy))


class _HeadLoss(torch.autograd.Function):
    """Computes loss and gradient in one pass over the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        teacher: tuple[Tensor, Head, Distillation] | None,
    ) -> tuple[Tensor, Tensor]:
        head, gradient = Head(weight, bias), torch.empty_like(states)
        of_head = _HeadGradient(head, *ctx.needs_input_grad[1:3])
        loss = torch.zeros((), dtype=torch.float64, device=states.device)
        entropy = torch.zeros_like(loss)
        count = ROWS.get(states.device.type, ROWS["cpu"])
        for first in range(0, len(labels), count):
            rows = slice(first, first + count)
            logits = head.logits(states[rows])
            wanted = None
            if teacher is not None:
                there = teacher[0][rows].to(teacher[1].device or states.device)
                wanted = teacher[1].logits(there).to(states.device)
            some, own, slope = _loss_of_logits(
                logits, labels[rows], wanted, None if teacher is None else teacher[2]
            )
            loss += some.double()
            entropy += own.double()
            gradient[rows] = head.backward(slope)
            of_head.add(slope, states[rows])
        ctx.save_for_backward(gradient, of_head.weight, of_head.bias)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * outer[0].to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None)


class _HeadGradient:
    """The gradient of a head, added up over its tokens; None where it is not wanted."""

    def __init__(self, head: Head, of_weight: bool, of_bias: bool) -> None:
        self.weight = _zeros(head.weight) if of_weight and head.weight is not None else None
        self.bias = _zeros(head.bias) if of_bias and head.bias is not None else None

    def add(self, slope: Tensor, states: Tensor) -> None:
        if self.weight is not None:
            self.weight += slope.T @ states.to(slope)
        if self.bias is not None:
            self.bias += slope.sum(0)


def _zeros(values: Tensor) -> Tensor:
    """Zeros like these in at least float32: they are added up."""
    return torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))


def _loss_of_logits(
    logits: Tensor, labels: Tensor, wanted: Tensor | None, distillation: Distillation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of loss and cross-entropy over a few tokens, and the gradient of the loss."""
    log_p = logits.log_softmax(dim=1)
    entropy = -log_p.gather(1, labels[:, None]).sum()
    if wanted is None or distillation is None:
        return entropy, entropy, _less_at(log_p.exp_(), labels, 1.0)
    weight, temperature = distillation.weight, distillation.temperature
    log_q = (wanted / temperature).log_softmax(dim=1)
    q = log_q.exp()
    soft = log_p if temperature == 1 else (logits / temperature).log_softmax(dim=1)
    divergence = (q * log_q.sub_(soft)).sum()
    loss = (1 - weight) * entropy + weight * temperature**2 * divergence
    slope = soft.exp().sub_(q).mul_(weight * temperature)
    if weight < 1:
        slope += _less_at(log_p.exp(), labels, 1.0).mul_(1 - weight)
    return loss, entropy, slope


def _less_at(values: Tensor, labels: Tensor, amount: float) -> Tensor:
    """Subtract `amount` from `values` at each row's label, in place."""
    return values.scatter_add_(1, labels[:, None], values.new_full((len(labels), 1), -amount))
