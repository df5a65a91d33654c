"""The fold of row sums in Triton, and both operators of one layer.

From sum x^2, sum y^2, sum d^2 and sum |d| of a token, with a = ||x|| and b = ||y||, the metrics
1 - cos(x, y) = (sum d^2 - (b - a)^2) / (2 a b), sum d^2, sum |d| / hidden_size, ||d|| / a, a and b;
from these sums, sums of squares, maxima and their tokens of each running state and layer
(`simdiff_kernels.reference.fold` is the specification).

Bytes moved per token and layer: 32 read; `num_metrics` values written where every token is kept.
Data path: a program (a CTA of 256 threads) for each state and layer goes over the state's own
tokens, a consecutive range, a tile of 256 at a time: global memory -> registers, a token to each
thread, in float64 -> after the last tile joined over all threads, always in the same order -> the
state. Latency is the limit, predicted and not measured: roots and divisions in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..metrics import ALL_TOKENS, APART, COUNTED, METRICS, result_dtype
from .launch import launch
from .row_sums import row_sums

NUM_METRICS = tl.constexpr(len(METRICS))
COLUMNS = tl.constexpr(len(METRICS) + 2)  # and two counts: of tokens averaged, of those not finite
THREADS = 256  # of a program, one for each token of a tile
_COUNTED = tl.constexpr(COUNTED)
_APART = tl.constexpr(APART)


@triton.jit
def _metrics(p_sums, o_token, m_token, hidden_size):
    """The metrics of each token, (TOKENS, COLUMNS) with two columns of zeros, and sum x^2 + y^2."""
    p_token = p_sums + o_token * 4
    xx = tl.load(p_token, mask=m_token, other=0.0)
    yy = tl.load(p_token + 1, mask=m_token, other=0.0)
    dd = tl.load(p_token + 2, mask=m_token, other=0.0)
    ad = tl.load(p_token + 3, mask=m_token, other=0.0)
    # 1 - cos = (||d||^2 - (b - a)^2) / (2 a b), b - a = (b^2 - a^2) / (a + b). A zero vector: the
    # metrics are 0 or 1 by definition. NaN passes all comparisons here.
    a, b = tl.sqrt(xx), tl.sqrt(yy)
    gap = (yy - xx) / tl.where(a + b == 0, 1.0, a + b)
    product = a * b
    cosine = (dd - gap * gap) / tl.where(product == 0, 1.0, 2 * product)
    cosine = tl.where(cosine < 0, 0.0, tl.where(cosine > 2, 2.0, cosine))
    cosine = tl.where(product == 0, tl.where(a != b, 1.0, 0.0), cosine)
    relative = tl.sqrt(dd) / tl.where(a == 0, 1.0, a)
    relative = tl.where(a == 0, tl.where(dd != 0, 1.0, 0.0), relative)
    zero = tl.zeros_like(xx)
    even = tl.join(tl.join(cosine, a), tl.join(ad / hidden_size, zero))
    odd = tl.join(tl.join(dd, b), tl.join(relative, zero))
    return tl.reshape(tl.join(even, odd), (o_token.shape[0], COLUMNS)), xx + yy


@triton.jit(do_not_specialize=["p_per_token", "p_sums", "num_tokens", "hidden_size"])
def _token_metrics_kernel(
    p_per_token, p_sums, num_tokens: tl.int64, hidden_size: tl.int32, TOKENS: tl.constexpr
):
    """Each program stores the metrics of a tile of tokens of one layer."""
    i_layer = tl.program_id(1).to(tl.int64)
    o_token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    m_token = o_token < num_tokens
    b_metrics, _ = _metrics(p_sums + i_layer * num_tokens * 4, o_token, m_token, hidden_size)
    o_m = tl.arange(0, COLUMNS)[None, :]
    p_out = p_per_token + i_layer * num_tokens * NUM_METRICS + o_m * num_tokens + o_token[:, None]
    tl.store(p_out, b_metrics, mask=m_token[:, None] & (o_m < NUM_METRICS))


_ARGUMENTS = (
    "p_moments",
    "p_counts",
    "p_sums",
    "p_kinds",
    "num_tokens",
    "hidden_size",
    "first_state",
    "offset",
    "tokens_per_state",
)


@triton.jit(do_not_specialize=_ARGUMENTS)
def _fold_kernel(
    p_moments,
    p_counts,
    p_sums,
    p_kinds,
    num_tokens: tl.int64,
    hidden_size: tl.int32,
    first_state: tl.int64,
    offset: tl.int64,
    tokens_per_state: tl.int64,
    TOKENS: tl.constexpr,
    APART: tl.constexpr,
):
    """Each program folds into one state of one layer the tokens that belong to it, in order."""
    i_state, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_sums += i_layer * num_tokens * 4
    i_running = i_state * tl.num_programs(1) + i_layer
    p_moments += i_running * (3 * NUM_METRICS)
    p_counts += i_running * (NUM_METRICS + 3)
    first = (i_state - first_state) * tokens_per_state - offset
    end = tl.minimum(first + tokens_per_state, num_tokens)
    first = tl.maximum(first, 0)
    kind = _COUNTED
    if APART:
        m_apart = i_state == tl.num_programs(0) - 1
        last = 0 if p_kinds is None else num_tokens
        first, end = tl.where(m_apart, 0, first), tl.where(m_apart, last, end)
        kind = tl.where(m_apart, _APART, _COUNTED)

    # Each thread has a state of its own, of every TOKENS-th token; they are joined at the end.
    o_m = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((TOKENS, COLUMNS), tl.float64)
    squares = tl.zeros((TOKENS, COLUMNS), tl.float64)
    maxima = tl.full((TOKENS, COLUMNS), float("-inf"), tl.float64)
    i_peak = tl.full((TOKENS, COLUMNS), -1, tl.int32)  # the tile of the maximum
    for i_first in tl.range(first, end, TOKENS, num_stages=3):
        i_tile = ((i_first - first) // TOKENS).to(tl.int32)
        o_token = i_first + tl.arange(0, TOKENS)
        m_token = o_token < end
        b_metrics, norms = _metrics(p_sums, o_token, m_token, hidden_size)
        if p_kinds is not None:
            b_kind = tl.load(p_kinds + o_token, mask=m_token, other=0)
            m_token &= b_kind.to(tl.int32) == kind
        # A NaN or Inf in a token reaches its norms; Inf and NaN alone fail this.
        m_finite = norms < float("inf")
        m_used, m_lost = (m_token & m_finite)[:, None], (m_token & ~m_finite)[:, None]
        b_used = tl.where(m_used, b_metrics, 0.0)
        m_one = tl.where(o_m == NUM_METRICS, m_used, m_lost)
        sums += tl.where(o_m < NUM_METRICS, b_used, tl.where(m_one, 1.0, 0.0))
        squares += b_used * b_used
        m_higher = m_used & (b_metrics > maxima)
        maxima = tl.where(m_higher, b_metrics, maxima)
        i_peak = tl.where(m_higher, i_tile, i_peak)

    peak = tl.max(maxima, axis=0)
    o_peak = first + i_peak.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    m_peak = (maxima == peak[None, :]) & (i_peak >= 0)
    where = tl.min(tl.where(m_peak, o_peak, 0x7FFFFFFFFFFFFFFF), axis=0)  # the earliest
    total, square = tl.sum(sums, axis=0), tl.sum(squares, axis=0)

    o_m = tl.arange(0, COLUMNS)
    m_metric = o_m < NUM_METRICS
    p_moments += o_m
    maximum = tl.load(p_moments + 2 * NUM_METRICS, mask=m_metric, other=float("-inf"))
    total_before = tl.load(p_moments, mask=m_metric, other=0.0)
    square_before = tl.load(p_moments + NUM_METRICS, mask=m_metric, other=0.0)
    counts_before = tl.load(p_counts + o_m)
    num_seen = tl.load(p_counts + COLUMNS)
    argmax = tl.where(peak > maximum, where + num_seen, counts_before)
    count = counts_before + tl.where(m_metric, 0.0, total).to(tl.int64)
    tl.debug_barrier()  # the state is read by all threads before one of them replaces it
    tl.store(p_moments, total_before + total, mask=m_metric)
    tl.store(p_moments + NUM_METRICS, square_before + square, mask=m_metric)
    tl.store(p_moments + 2 * NUM_METRICS, tl.maximum(maximum, peak), mask=m_metric)
    tl.store(p_counts + o_m, tl.where(m_metric, argmax, count))
    tl.store(p_counts + COLUMNS, num_seen + num_tokens)


def fold(
    moments: Tensor,
    counts: Tensor,
    sums: Tensor,
    hidden_size: int,
    kinds: Tensor | None = None,
    first_state: int = 0,
    offset: int = 0,
    tokens_per_state: int = ALL_TOKENS,
    apart: bool = False,
    per_token: Tensor | None = None,
) -> None:
    """`simdiff_kernels.reference.fold` on the current stream: one launch, two with `per_token`.

    All tensors must be contiguous; `kinds` may also be bool.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    num_states, num_layers = moments.shape[:2]
    num_tokens = sums.shape[1] * sums.shape[2]
    shape = (num_states, num_layers, num_tokens)
    places = (first_state, offset, tokens_per_state)
    _fold(moments, counts, sums, hidden_size, kinds, per_token, shape, places, apart)


def _fold(
    moments: Tensor,
    counts: Tensor,
    sums: Tensor,
    hidden_size: int,
    kinds: Tensor | None,
    per_token: Tensor | None,
    shape: tuple[int, int, int],
    places: tuple[int, int, int],
    apart: bool,
) -> None:
    """Launch what `fold` needs; `shape` counts states, layers and tokens."""
    for tensor in (moments, counts, sums, kinds, per_token):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"fold: all tensors must be contiguous, got {tensor.stride()}")
    num_states, num_layers, num_tokens = shape
    if num_tokens == 0:
        return
    if per_token is not None:
        _store_token_metrics(per_token, sums, num_layers, num_tokens, hidden_size)
    first_state, offset, tokens_per_state = places
    # More tokens than there are make no difference, and might overflow.
    tokens_per_state = min(tokens_per_state, offset + num_tokens)
    numbers = (num_tokens, hidden_size, first_state, offset, tokens_per_state)
    launch(
        _fold_kernel,
        (num_states, num_layers, 1),
        (moments, counts, sums, kinds, *numbers),
        (THREADS, apart),
        (None if kinds is None else kinds.dtype,),
        THREADS,
    )


def _store_token_metrics(
    per_token: Tensor, sums: Tensor, num_layers: int, num_tokens: int, hidden_size: int
) -> None:
    launch(
        _token_metrics_kernel,
        (-(-num_tokens // THREADS), num_layers, 1),
        (per_token, sums, num_tokens, hidden_size),
        (THREADS,),
        (per_token.dtype,),
        THREADS,
    )


def token_metrics(before: Tensor, after: Tensor) -> Tensor:
    """`simdiff_kernels.reference.token_metrics` on the current stream, two launches."""
    outer, inner, hidden_size = before.shape
    out = before.new_empty((len(METRICS), outer, inner), dtype=result_dtype(before.dtype))
    if outer * inner:
        sums = before.new_empty((outer, inner, 4), dtype=torch.float64)
        row_sums(sums, before, after)
        _store_token_metrics(out, sums, 1, outer * inner, hidden_size)
    return out


def accumulate(
    moments: Tensor,
    counts: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor | None = None,
    per_token: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """`simdiff_kernels.reference.accumulate`: `row_sums`, then `fold` with the parts as states.

    Each part takes a run of tokens, all runs of one length. `scratch`, float64 with at least 4
    entries for each token, of any value, receives the row sums; calls that share one must be on
    one stream. Without it one is allocated.

    Raises:
        ValueError: `scratch` is too small, or a tensor is not contiguous.
    """
    outer, inner, hidden_size = before.shape
    num_tokens = outer * inner
    if num_tokens == 0:
        return
    if scratch is None:
        scratch = before.new_empty(4 * num_tokens, dtype=torch.float64)
    elif scratch.numel() < 4 * num_tokens:
        raise ValueError(
            f"accumulate: scratch must have at least {4 * num_tokens} entries for {num_tokens} "
            f"tokens, got {scratch.numel()}"
        )
    # All tokens are measured where all are kept.
    row_sums(scratch, before, after, mask if per_token is None else None)
    num_parts = moments.shape[0]
    places = (0, 0, -(-num_tokens // num_parts))
    shape = (num_parts, 1, num_tokens)
    _fold(moments, counts, scratch, hidden_size, mask, per_token, shape, places, False)
