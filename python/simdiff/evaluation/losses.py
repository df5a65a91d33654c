"""Negative log-likelihoods of tokens and of windows, and the perplexity of their mean."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.evaluation.streamed_losses import losses_in_one_pass
from simdiff.io import ranks
from simdiff.io.progress import silent
from simdiff.models.running import in_evaluation
from simdiff.models.streamed import stream_of
from simdiff.models.sweep import WHOLE, Plan
from simdiff.models.windows import check_windows

# Number of tokens whose logits are converted to float32 at a time, so that they stay in the cache.
# For 511 tokens and a vocabulary of 49152 this takes a quarter of the time of all tokens at once
# (one thread of an AMD EPYC).
_ROWS = 64


@in_evaluation
@torch.inference_mode()
def window_losses(
    model: PreTrainedModel, windows: Tensor, *, description: str | None = "perplexity"
) -> list[float]:
    """Mean negative log-likelihood of each window, in nats per predicted token; may be NaN or Inf.

    Args:
        model, windows: see `perplexity`.
        description: text of the progress bar; None shows none.
    """
    check_windows(model, [windows], "perplexity")
    ranks.agree("what is evaluated", {"tokens": windows.cpu().numpy().tobytes()})
    # Windows are read one at a time, since the logits are the largest tensor of a run.
    parts = windows.split(1)
    if stream_of(model) is not None:
        with contextlib.nullcontext() if description else silent():
            return losses_of_plans(model, windows, [WHOLE], description or "perplexity")[WHOLE]
    return ranks.shared(lambda ids: window_loss(model, ids), parts, description)


def losses_of_plans(
    model: PreTrainedModel, windows: Tensor, plans: Sequence[Plan], description: str
) -> dict[Plan, list[float]]:
    """`window_losses` of a streamed model without the layers of each plan, in one pass."""
    parts = windows.split(1)
    found = losses_in_one_pass(
        model,
        parts,
        dict.fromkeys(plans, range(len(parts))),
        lambda index: token_losses(model, parts[index][0]),
        purpose=description,
    )
    return {
        plan: [float(found[plan][index].double().mean()) for index in range(len(parts))]
        for plan in plans
    }


def window_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean negative log-likelihood of one window `(1, window_length)`, summed in float64."""
    return float(token_losses(model, ids[0]).double().mean())


def exponential(nll: float) -> float:
    """exp of a mean negative log-likelihood, a perplexity; Inf if it exceeds float64."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@in_evaluation
@torch.no_grad()
def token_losses(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Negative log-likelihood of every token of a window except the first, float32, in nats.

    Args:
        model: causal language model.
        window: token ids `(window_length,)`.
    """
    ids = window.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return losses_of_logits(logits, ids[1:])


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target `(num_tokens,)`, float32, in nats.

    Args:
        logits: `(num_tokens, vocabulary)`, of any dtype; a few rows at a time become float32.
        targets: token ids `(num_tokens,)`.
    """
    parts = zip(logits.split(_ROWS), targets.to(logits.device).split(_ROWS), strict=True)
    entropy = torch.nn.functional.cross_entropy
    return torch.cat([entropy(some.float(), wanted, reduction="none") for some, wanted in parts])
