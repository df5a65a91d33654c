"""Perplexity of a whole text by windows that may overlap; overlaps are context and not counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.data.documents import Text
from simdiff.data.records import source_record
from simdiff.data.text import adds_bos, text_tokens, too_short
from simdiff.errors import SimdiffError
from simdiff.evaluation.intervals import mean_loss
from simdiff.evaluation.losses import losses_of_logits
from simdiff.evaluation.streamed_losses import losses_in_one_pass
from simdiff.io import ranks
from simdiff.models.running import in_evaluation
from simdiff.models.streamed import stream_of
from simdiff.models.sweep import WHOLE, Plan
from simdiff.models.windows import check_windows


@dataclass(frozen=True)
class TextWindow:
    """A run of tokens that a model reads at once, and the first token whose prediction counts."""

    start: int
    end: int
    first: int
    """Index of the first predicted token; equal to `start` only if a BOS token precedes it."""


def text_windows(
    num_tokens: int, window_length: int, stride: int, bos: bool = False
) -> list[TextWindow]:
    """Windows that begin every `stride` tokens and predict the tokens no earlier window predicted.

    If the stride is less than the window's length, every token of the text but the first is
    predicted once, after the first window with at least window_length - stride tokens of context.
    If it equals the window's length, windows are independent and the first token of each is given.
    With BOS, which counts in the window's length, no token is given. The last window is shorter.

    Args:
        num_tokens: number of tokens of the text, without BOS.
        window_length: number of tokens that the model reads at once.
        stride: tokens between the starts of windows, at most the window's length without BOS.
        bos: whether each window begins with a BOS token.

    Raises:
        SimdiffError: a number is out of range, or the text is shorter than one window.

    Source: transformers' documentation, "Perplexity of fixed-length models".
    """
    content = window_length - int(bos)
    if content < 1 + int(not bos):
        raise SimdiffError(f"window length must be at least 2 tokens, got {window_length}")
    if not 1 <= stride <= content:
        raise SimdiffError(
            f"stride must be 1 to {content} tokens (the window of {window_length}"
            f"{' less BOS' if bos else ''}), got {stride}"
        )
    if num_tokens < content:
        raise SimdiffError(
            f"the text must fill one window of {window_length} tokens, got {num_tokens} tokens"
        )
    windows: list[TextWindow] = []
    done = 0
    for start in range(0, num_tokens, stride):
        end = min(start + content, num_tokens)
        first = max(done, start + int(not bos))
        if first < end:
            windows.append(TextWindow(start, end, first))
        done = end
        if end == num_tokens:
            break
    return windows


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a part of a text, its division into windows, and its source."""

    tokens: Tensor
    """Token ids, `(num_tokens,)`, int64, without BOS."""
    windows: list[TextWindow]
    bos_token: int | None
    """BOS token before each window; None if the tokenizer puts none before a text."""
    identity: dict[str, Any]


def read_text(
    source: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: str = "held-out",
    num_windows: int = 32,
    window_length: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> TokenizedText:
    """Read the tokens and windows of a text; without overlap they are those of `token_windows`.

    Args:
        source, part, seed: see `token_windows`.
        num_windows: upper limit of the number of windows, all of full length; 0 reads the part.
        window_length: number of tokens in a window, including BOS.
        stride: tokens from the start of a window to that of the next; None or the window's length
            makes windows without overlap.

    Raises:
        SimdiffError: the text is shorter than one window, or a number is out of range.
    """
    bos = adds_bos(tokenizer)
    content = window_length - int(bos)
    step = content if stride is None or stride == window_length else stride
    if num_windows < 0:
        raise SimdiffError(f"windows must be 0 (all of the text) or more, got {num_windows}")
    enough = content + step * (num_windows - 1) if num_windows else None
    found = text_tokens(source, tokenizer, part=part, seed=seed, enough=enough)
    if len(found.tokens) < content:
        raise too_short(source, part, window_length, found)
    windows = text_windows(len(found.tokens), window_length, step, bos)
    if num_windows:
        windows = [window for window in windows if window.end - window.start == content]
        windows = windows[:num_windows]
    used = torch.tensor(found.tokens[: windows[-1].end])
    digest = hashlib.sha256(used.numpy().astype("<i8").tobytes())
    return TokenizedText(
        used,
        windows,
        int(tokenizer.bos_token_id) if bos else None,
        {
            **source_record(source),
            "part": part,
            "seed": seed,
            "num_documents": found.num_documents,
            "num_windows": len(windows),
            "window_length": window_length,
            "stride": step,
            "whole": num_windows == 0,
            "bos": bos,
            "num_tokens": len(used),
            "tokens_sha256": digest.hexdigest(),
        },
    )


@dataclass(frozen=True)
class TextPerplexity:
    """exp of the mean negative log-likelihood over all predicted tokens, with an interval."""

    perplexity: float
    nll: float
    """Mean loss in nats per token."""
    standard_error: float | None
    """Standard error of `nll` over runs of windows; like the limits, None for a single run."""
    low: float | None
    """Lower limit of the 95% interval of the perplexity."""
    high: float | None
    num_tokens: int
    """Number of predicted tokens."""
    num_runs: int
    """Number of runs of windows; each predicts at least as many tokens as one window."""
    losses: tuple[tuple[float, int], ...]
    """Summed negative log-likelihood and number of predicted tokens of each run of windows."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the losses of runs of windows."""
        content = asdict(self)
        del content["losses"]
        content["num_blocks"] = content.pop("num_runs")  # the name in files
        return content


def text_perplexity(
    model: PreTrainedModel,
    text: TokenizedText,
    *,
    description: str = "perplexity",
    sums: Callable[..., list[tuple[float, int]]] | None = None,
) -> TextPerplexity:
    """Token-weighted perplexity of a text.

    The interval is that of `mean_loss` over runs of consecutive windows. Windows that overlap share
    context, so a run takes windows until it has predicted as many tokens as one window holds; runs
    are treated as independent. `sums` takes the place of `window_sums`.

    Raises:
        SimdiffError: the loss of some window is NaN or Inf.
    """
    found = (sums or window_sums)(model, text, description=description)
    bad = [index for index, (loss, _) in enumerate(found) if not math.isfinite(loss)]
    if bad:
        raise SimdiffError(
            f"text_perplexity: the loss must be finite, got NaN or Inf in {len(bad)} of "
            f"{len(found)} windows, first in window {bad[0]}"
        )
    runs = joined_windows(found, text.identity["window_length"])
    mean = mean_loss(runs)
    return TextPerplexity(
        mean.perplexity,
        **asdict(mean),
        num_tokens=sum(count for _, count in runs),
        num_runs=len(runs),
        losses=tuple(runs),
    )


@in_evaluation
@torch.inference_mode()
def window_sums(
    model: PreTrainedModel, text: TokenizedText, *, description: str = "perplexity"
) -> list[tuple[float, int]]:
    """For each window, the negative log-likelihood summed in float64, and the number of tokens."""
    check_windows(model, [text.tokens], "evaluate", length=text.identity["window_length"])
    ranks.agree("the text that is evaluated", {"text": text.identity})
    if stream_of(model) is not None:
        return sums_of_plans(model, text, [WHOLE], description=description)[WHOLE]
    return ranks.shared(
        lambda window: (float(_losses(model, *window).double().sum()), window[1]),
        read_windows(text),
        description,
    )


def sums_of_plans(
    model: PreTrainedModel, text: TokenizedText, plans: Sequence[Plan], *, description: str
) -> dict[Plan, list[tuple[float, int]]]:
    """`window_sums` of a streamed model without the layers of each plan, in one pass."""
    check_windows(model, [text.tokens], "evaluate", length=text.identity["window_length"])
    windows = read_windows(text)
    found = losses_in_one_pass(
        model,
        [ids[None] for ids, _ in windows],
        dict.fromkeys(plans, range(len(windows))),
        lambda index: _losses(model, *windows[index]),
        purpose=description,
    )
    return {
        plan: [
            (float(found[plan][index].double().sum()), count)
            for index, (_, count) in enumerate(windows)
        ]
        for plan in plans
    }


def read_windows(text: TokenizedText) -> list[tuple[Tensor, int]]:
    """The token ids of each window, with BOS, and how many of its last tokens are predicted."""
    windows = []
    for window in text.windows:
        ids = text.tokens[window.start : window.end]
        if text.bos_token is not None:
            ids = torch.cat([ids.new_tensor([text.bos_token]), ids])
        windows.append((ids, window.end - window.first))
    return windows


def _losses(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
    return losses_of_logits(logits[-count - 1 : -1], ids[-count:])


def joined_windows(sums: Sequence[tuple[float, int]], length: int) -> list[tuple[float, int]]:
    """Join consecutive windows into runs that predict at least `length` - 1 tokens each.

    It is one less than a window's length because a single window predicts all but its first token.
    Remaining windows at the end join the run before them.
    """
    runs: list[tuple[float, int]] = []
    total, count = 0.0, 0
    for loss, tokens in sums:
        total, count = total + loss, count + tokens
        if count >= length - 1:
            runs.append((total, count))
            total, count = 0.0, 0
    if count and runs:
        runs[-1] = (runs[-1][0] + total, runs[-1][1] + count)
    elif count:
        runs.append((total, count))
    return runs
