"""Perplexity of a whole text by windows that may overlap: the overlap is context, never counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.calibration import Text, adds_bos, source_name, text_tokens
from simdiff.errors import SimdiffError
from simdiff.evaluation import exponential
from simdiff.intervals import CONFIDENCE
from simdiff.progress import track

# Tokens whose logits are widened at a time, see `simdiff.evaluation`.
_ROWS = 64
# Draws of blocks for an interval.
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class TextWindow:
    """A run of tokens that a model reads at once, and from where on its predictions count."""

    start: int
    end: int
    first: int
    """The first token that is predicted; `start` only where a BOS token stands before it."""


def text_windows(
    num_tokens: int, window_length: int, stride: int, bos: bool = False
) -> list[TextWindow]:
    """Windows that begin every `stride` tokens and predict what no window before them did.

    With a stride below the window's length every token of the text but the first is predicted once,
    with at least window_length - stride tokens of context after the first window. With a stride of
    the window's length each window stands for itself, and its first token is given. With BOS, which
    counts to the window's length, no token is given. The last window is shorter.

    Args:
        num_tokens: of the text, without BOS.
        window_length: tokens that the model reads at once.
        stride: at most the window's length without BOS.
        bos: whether each window begins with a BOS token.

    Raises:
        SimdiffError: bad numbers, or a text shorter than one window.

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
class TextPart:
    """The tokens of a part of a text, how they are cut into windows, and where they came from."""

    tokens: Tensor
    """`(num_tokens,)`, int64, without BOS."""
    windows: list[TextWindow]
    bos_token: int | None
    """Before each window; None where the tokenizer puts none before a text."""
    identity: dict[str, Any]


def text_part(
    source: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: str = "held-out",
    num_windows: int = 32,
    window_length: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> TextPart:
    """Tokens and windows of a text; without overlap the same as of `token_windows`.

    Args:
        source, part, seed: see `token_windows`.
        num_windows: at most so many, all of full length; 0 for the whole part.
        window_length: BOS counts.
        stride: tokens from one window's start to the next; None or the window's length for windows
            without overlap.

    Raises:
        SimdiffError: the text is shorter than one window; bad numbers.
    """
    bos = adds_bos(tokenizer)
    content = window_length - int(bos)
    step = content if stride is None or stride == window_length else stride
    if num_windows < 0:
        raise SimdiffError(f"windows must be 0 (all of the text) or more, got {num_windows}")
    enough = content + step * (num_windows - 1) if num_windows else None
    tokens, num_documents = text_tokens(source, tokenizer, part=part, seed=seed, enough=enough)
    try:
        windows = text_windows(len(tokens), window_length, step, bos)
    except SimdiffError as error:
        raise SimdiffError(f"text {source_name(source)}, its {part} part: {error}") from None
    if num_windows:
        windows = [window for window in windows if window.end - window.start == content]
        windows = windows[:num_windows]
    used = torch.tensor(tokens[: windows[-1].end])
    digest = hashlib.sha256(used.numpy().astype("<i8").tobytes())
    return TextPart(
        used,
        windows,
        int(tokenizer.bos_token_id) if bos else None,
        {
            "source": source_name(source),
            "part": part,
            "seed": seed,
            "num_documents": num_documents,
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
    """In nats per token."""
    standard_error: float | None
    """Of `nll`, over blocks; None for a single one, as are the limits."""
    low: float | None
    """Of the perplexity, 95%."""
    high: float | None
    num_tokens: int
    """Predicted tokens."""
    num_blocks: int
    """Runs of windows that predict at least as many tokens as a window holds: what is drawn."""
    losses: tuple[tuple[float, int], ...]
    """Of each block: summed negative log-likelihood and number of predicted tokens."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the blocks."""
        content = asdict(self)
        del content["losses"]
        return content


def text_perplexity(
    model: PreTrainedModel, text: TextPart, *, description: str = "perplexity"
) -> TextPerplexity:
    """Token-weighted perplexity of a text.

    The interval is the percentile bootstrap over blocks of consecutive windows. Windows that
    overlap share context, so a block takes windows until it has predicted as many tokens as one
    window holds; blocks are treated as independent.

    Raises:
        SimdiffError: the loss of some window is NaN or Inf.
    """
    sums = window_sums(model, text, description=description)
    bad = [index for index, (loss, _) in enumerate(sums) if not math.isfinite(loss)]
    if bad:
        raise SimdiffError(
            f"text_perplexity: the loss must be finite, got NaN or Inf in {len(bad)} of "
            f"{len(sums)} windows, first in window {bad[0]}"
        )
    blocks = blocks_of(sums, text.identity["window_length"])
    count = sum(n for _, n in blocks)
    nll = math.fsum(loss for loss, _ in blocks) / count
    error = low = high = None
    if len(blocks) > 1:
        error = _ratio_error(blocks, nll)
        low, high = bootstrap_interval(blocks)
    return TextPerplexity(
        exponential(nll), nll, error, low, high, count, len(blocks), tuple(blocks)
    )


@torch.inference_mode()
def window_sums(
    model: PreTrainedModel, text: TextPart, *, description: str = "perplexity"
) -> list[tuple[float, int]]:
    """Of each window: summed negative log-likelihood, accumulated in float64, and its tokens."""
    device = model.get_input_embeddings().weight.device
    sums = []
    for window in track(text.windows, description):
        ids = text.tokens[window.start : window.end]
        if text.bos_token is not None:
            ids = torch.cat([ids.new_tensor([text.bos_token]), ids])
        count = window.end - window.first
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
        total = sum(_losses(logits[-count - 1 : -1], ids[-count:].to(logits.device)))
        sums.append((float(total), count))
    return sums


def _losses(logits: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Summed losses of some tokens at a time, each token's in float32, their sum in float64."""
    for some, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        losses = torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none")
        yield losses.double().sum()


def blocks_of(sums: Sequence[tuple[float, int]], length: int) -> list[tuple[float, int]]:
    """Windows in their order, joined until each block predicts a window's length, less one.

    One less, since a window on its own predicts all but its first token. What is left over at the
    end joins the block before it.
    """
    blocks: list[tuple[float, int]] = []
    total, count = 0.0, 0
    for loss, tokens in sums:
        total, count = total + loss, count + tokens
        if count >= length - 1:
            blocks.append((total, count))
            total, count = 0.0, 0
    if count and blocks:
        blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + count)
    elif count:
        blocks.append((total, count))
    return blocks


def _ratio_error(blocks: Sequence[tuple[float, int]], nll: float) -> float:
    """Standard error of Σ loss / Σ tokens (linearised; for equal blocks that of a mean)."""
    squares = math.fsum((loss - nll * count) ** 2 for loss, count in blocks)
    mean = sum(count for _, count in blocks) / len(blocks)
    return math.sqrt(squares / (len(blocks) - 1) / len(blocks)) / mean


def bootstrap_interval(
    blocks: Sequence[tuple[float, int]],
    dense: Sequence[tuple[float, int]] | None = None,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a perplexity, or of its ratio to the dense model's, over blocks.

    Args:
        blocks: of the model: summed loss and tokens.
        dense: of the dense model on the same tokens; the same blocks are drawn for both.
        seed: of the draws.

    Raises:
        SimdiffError: fewer than two blocks; other blocks of the dense model.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), Section 13.3.
    """
    counts = [count for _, count in blocks]
    if len(blocks) < 2 or (dense is not None and [count for _, count in dense] != counts):
        raise SimdiffError(
            f"bootstrap_interval: blocks must be two or more, and the dense model's the same, got "
            f"{counts} and {None if dense is None else [count for _, count in dense]}"
        )
    values = torch.tensor([loss for loss, _ in blocks], dtype=torch.float64)
    if dense is not None:
        values = values - torch.tensor([loss for loss, _ in dense], dtype=torch.float64)
    tokens = torch.tensor(counts, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(0, NUM_RESAMPLES, 1000):  # a whole corpus has thousands of blocks
        drawn = torch.randint(len(blocks), (1000, len(blocks)), generator=generator)
        means.append(values[drawn].sum(1) / tokens[drawn].sum(1))
    limits = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(limits).tolist()
    return exponential(low), exponential(high)
