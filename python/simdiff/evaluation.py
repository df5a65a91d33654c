"""Quality: perplexity on held-out windows, and proof that cached generation is the model's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.errors import SimdiffError
from simdiff.progress import track

# Tokens whose logits are widened at a time, so that they stay in the cache: for 511 tokens and a
# vocabulary of 49152 it takes a quarter of the time of all at once (one thread of an AMD EPYC).
_ROWS = 64


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over all predicted tokens."""

    perplexity: float
    nll: float
    """In nats per token."""
    standard_error: float | None
    """Of `nll`, over windows; None for a single one."""
    num_tokens: int
    """Predicted tokens: one less than the window length for each window."""


def perplexity(
    model: PreTrainedModel, windows: Tensor, *, description: str = "perplexity"
) -> Perplexity:
    """Token-weighted perplexity on windows that do not overlap, each on its own context.

    Args:
        model: causal language model.
        windows: token ids `(num_windows, window_length)`; the first token of each is given, all
            others are predicted.

    Raises:
        SimdiffError: the loss of some window is NaN or Inf.
    """
    losses = window_losses(model, windows, description=description)
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise SimdiffError(
            f"perplexity: the loss must be finite, got NaN or Inf in {len(bad)} of "
            f"{len(losses)} windows, first in window {bad[0]}"
        )
    nll = sum(losses) / len(losses)  # all windows predict equally many tokens
    error = None
    if len(losses) > 1:
        variance = sum((loss - nll) ** 2 for loss in losses) / (len(losses) - 1)
        error = math.sqrt(variance / len(losses))
    return Perplexity(exponential(nll), nll, error, windows[:, 1:].numel())


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel, windows: Tensor, *, description: str | None = "perplexity"
) -> list[float]:
    """Mean negative log-likelihood of each window, in nats per predicted token; may be NaN or Inf.

    Args:
        model, windows: see `perplexity`.
        description: of the progress bar; None shows none.
    """
    # One window at a time: the logits are the largest tensor of the whole run.
    parts = windows.split(1)
    return [
        window_loss(model, ids) for ids in (track(parts, description) if description else parts)
    ]


def window_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean negative log-likelihood of one window `(1, window_length)`, in float32."""
    ids = ids.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    targets = ids[0, 1:].to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for some, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        total += torch.nn.functional.cross_entropy(some.float(), wanted, reduction="sum").double()
    return float(total / targets.numel())


def exponential(nll: float) -> float:
    """The perplexity of a mean negative log-likelihood; Inf where it exceeds float64."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@torch.no_grad()
def token_losses(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Negative log-likelihood of every token of one window but its first, float32, in nats.

    Args:
        model: causal language model.
        window: token ids `(window_length,)`.
    """
    ids = window.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    targets = ids[1:].to(logits.device)
    parts = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    entropy = torch.nn.functional.cross_entropy
    return torch.cat([entropy(some.float(), wanted, reduction="none") for some, wanted in parts])


@dataclass(frozen=True)
class Generation:
    """A greedy continuation with the KV cache, and whether it is right."""

    prompt: str
    text: str
    equals_uncached: bool
    """Whether every token is also the best one by a forward over the whole text without cache."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 32
) -> Generation:
    """Continue a prompt greedily with the KV cache and check each step without it."""
    device = model.get_input_embeddings().weight.device
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    output = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    start = inputs["input_ids"].shape[1]
    logits = model(input_ids=output, use_cache=False).logits[0, start - 1 : -1].float()
    chosen = logits.gather(1, output[0, start:, None].to(logits.device)).squeeze(1)
    # The two computations round differently: the chosen token may lose to an equal one.
    slack = 1e-3 if model.dtype == torch.float32 else 0.25
    return Generation(
        prompt,
        tokenizer.decode(output[0, start:], skip_special_tokens=True),
        bool((logits.max(dim=1).values - chosen <= slack).all()),
    )
