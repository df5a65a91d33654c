"""Row sums and their fold, on every backend that has them, against the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simdiff_kernels import BACKENDS, METRICS, ops, reference
from simdiff_kernels.running_states import empty_state
from simdiff_kernels.testing import near


def operator(name: str, backend: str, device: str) -> Any:
    assert ops.has_implementation(name, backend, torch.device(device))
    return ops.OPERATORS[name][backend]


def tokens(outer: int, inner: int) -> tuple[Tensor, Tensor]:
    """No two alike but three equal ones, the largest, 256 tokens apart; two are not finite."""
    generator = torch.Generator().manual_seed(outer * inner)
    before, after = near((outer, inner, 40), 0.1)(generator)
    after = torch.lerp(before, after, torch.rand(outer, inner, 1, generator=generator))
    for token in (33, 256, 289):
        at = divmod(token, inner)
        before[at], after[at] = 5 * before[0, 0], -6 * after[0, 0]
    before[0, 2, 7], after[1, 3, 39] = torch.nan, torch.inf
    return before, after


# First state, offset, tokens per state, whether the last of six states is of tokens apart.
# The default of 2^62 tokens per state, four times that of the fifth state, would overflow.
PLACES = [(0, 0, 1 << 62, False), (0, 40, 150, True), (-1, 10, 100, False), (2, 0, 90, True)]


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("with_kinds", [False, True])
def test_fold(places: tuple[Any, ...], with_kinds: bool, backend: str, device: str) -> None:
    fold = operator("fold", backend, device)
    layers = [tokens(2, 170), tokens(2, 170)[::-1]]
    sums = torch.empty(2, 2, 170, 4, dtype=torch.float64)
    for out, states in zip(sums, layers, strict=True):
        reference.row_sums(out, *states)
    kinds = torch.randint(3, (2, 170), generator=torch.Generator().manual_seed(3)).byte()
    kinds[0, 2], kinds[1, 3] = 1, 2
    some = kinds if with_kinds else None
    wanted, found = empty_state(6, 2), [part.to(device) for part in empty_state(6, 2)]
    kept = torch.empty(2, len(METRICS), 2, 170, device=device)
    for _ in range(2):  # what comes again is no new maximum
        on_device = None if some is None else some.to(device)
        fold(*found, sums.to(device), 40, on_device, *places, kept)
        reference.fold(*wanted, sums, 40, some, *places)
    assert torch.equal(found[1].cpu(), wanted[1])
    assert torch.allclose(found[0].cpu(), wanted[0], rtol=1e-12, atol=0)
    metrics = reference.metrics_of_sums(sums, 40).transpose(0, 1)
    assert torch.allclose(kept.cpu().double(), metrics, rtol=2.0**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_accumulate_deals_out_all_tokens(parts: int, keep: bool, backend: str, device: str) -> None:
    """Whatever the parts, together they are the state; masked tokens are stored all the same."""
    accumulate = operator("accumulate", backend, device)
    before, after = tokens(3, 170)
    mask = torch.rand(3, 170, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[0, 2] = mask[1, 119] = True
    found = [part[:, 0].contiguous().to(device) for part in empty_state(parts, 1)]
    wanted = [part[:, 0] for part in empty_state(1, 1)]
    kept = torch.full((len(METRICS), 3, 170), -1.0, device=device) if keep else None
    on_device = [tensor.to(device) for tensor in (before, after, mask)]
    accumulate(*found, *on_device, kept)
    reference.accumulate(*wanted, before, after, mask)
    moments, counts = (part.cpu() for part in found)
    assert torch.equal(counts[:, -3:-1].sum(0), wanted[1][0, -3:-1])
    assert (counts[:, -1] == 510).all()
    short = 52 / 4 * 2.0**-24
    assert torch.allclose(moments[:, :2].sum(0), wanted[0][0, :2], rtol=2 * short, atol=0)
    assert torch.allclose(moments[:, 2].amax(0), wanted[0][0, 2], rtol=short, atol=0)
    first = moments[:, 2].argmax(0)  # of equal maxima that of the earliest part
    assert torch.equal(counts[first, range(len(METRICS))], wanted[1][0, : len(METRICS)])
    if kept is not None:
        metrics = reference.token_metrics(before.double(), after.double())
        assert torch.allclose(kept.cpu().double(), metrics, rtol=16 * short, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"], indirect=True)
def test_accumulate_is_row_sums_and_fold(backend: str, device: str) -> None:
    """Bit by bit, so that scores do not depend on when they are folded; scratch is used again.

    On the CPU one loop does both.
    """
    accumulate = operator("accumulate", backend, device)
    before, after = (states.to(device) for states in tokens(2, 170))
    scratch = torch.full((4 * 340,), torch.nan, dtype=torch.float64, device=device)
    sums = torch.empty(1, 2, 170, 4, dtype=torch.float64, device=device)
    found, wanted = ([part.to(device) for part in empty_state(1, 1)] for _ in range(2))
    for _ in range(2):
        accumulate(*(part[:, 0] for part in found), before, after, None, None, scratch)
        operator("row_sums", backend, device)(sums[0], before, after)
        operator("fold", backend, device)(*wanted, sums, 40)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_triton_refuses_what_it_cannot_use() -> None:
    triton = pytest.importorskip("simdiff_kernels.triton")
    moments, counts = (part[:, 0] for part in empty_state(1, 1))
    states = torch.ones(1, 2, 8)
    with pytest.raises(ValueError, match="at least 8 entries for 2 tokens, got 7"):
        triton.accumulate(moments, counts, states, states, scratch=torch.empty(7).double())
    moments, counts = empty_state(2, 2)
    with pytest.raises(ValueError, match="contiguous"):
        triton.fold(moments[:, :1], counts[:, :1], torch.ones(1, 1, 2, 4).double(), 8)
    assert int(counts.amax()) == 0
