"""The operator accumulate_blocks: what it refuses, opcheck, torch.compile, no tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simdiff_kernels import BLOCK_METRICS, METRICS, RunningBlockScores, _ops, blocks, ops
from simdiff_kernels.blocks import BlockScratch, accumulate_blocks
from simdiff_kernels.running_states import empty_block_state

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.fixture
def device(block_backend: str) -> str:
    return "cuda" if block_backend == "cuda" else "cpu"


def test_bad_operands() -> None:
    states, mask = [torch.randn(2, 3, 8) for _ in range(3)], torch.ones(2, 3, dtype=torch.uint8)
    moments, counts = empty_block_state(2, torch.device("cpu"), 4)

    def call(*operands: Any, **options: Any) -> None:
        accumulate_blocks(*(operands or (moments, counts, states)), **options)

    with pytest.raises(ValueError, match="accumulate_blocks: states must be 3 tensors.*got 2"):
        call(moments, counts, states[:2])
    with pytest.raises(TypeError, match="moments must be torch.float64, got torch.float32"):
        call(moments.float(), counts, states)
    with pytest.raises(ValueError, match=r"moments must have shape \(4, 11, 3, 3\), got \(4, 10"):
        call(moments[:, :10], counts, states)
    with pytest.raises(ValueError, match=r"counts must have shape \(4, 3\), got \(3, 3\)"):
        call(moments, counts[:3], states)
    with pytest.raises(ValueError, match="moments must be contiguous and on cpu like states"):
        call(moments.transpose(2, 3), counts, states)
    with pytest.raises(TypeError, match="kinds must be torch.uint8, got torch.bool"):
        call(kinds=mask.bool())
    with pytest.raises(ValueError, match=r"kinds must have shape \(2, 3\), got \(6,\)"):
        call(kinds=mask.flatten())
    with pytest.raises(ValueError, match=r"sums must have shape \(2, 2, 3, 4\), got \(3, 2, 3, 4"):
        call(sums=torch.empty(3, 2, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="offset must be at least 0.*got -1 and 4"):
        call(offset=-1, tokens_per_state=4)
    with pytest.raises(ValueError, match="tokens_per_state at least 1, got 0 and 0"):
        call(tokens_per_state=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        call(backend="fast")
    assert not moments.any()
    assert not counts.any()


def test_a_device_whose_backends_lack_the_operator_gets_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has = ops.has_implementation
    monkeypatch.setattr(blocks, "usable_backends", lambda device: ("cuda", "triton", "reference"))
    monkeypatch.setattr(
        blocks, "has_implementation", lambda *key: key[1] == "reference" and has(*key)
    )
    assert blocks._resolve(None, torch.device("cuda")) == "reference"
    states = [torch.randn(2, 8) for _ in range(2)]
    with pytest.raises(ValueError, match="backend 'cpu' has no accumulate_blocks on cpu tensors"):
        RunningBlockScores(1, backend="cpu").update(states)


def operands(dtype: torch.dtype, device: str, masked: bool) -> tuple[Any, ...]:
    states = [torch.randn(2, 3, 40).to(dtype).to(device) for _ in range(4)]
    kinds = torch.tensor([[1, 2, 0]] * 2, dtype=torch.uint8, device=device) if masked else None
    sums = torch.empty(3, 2, 3, 4, dtype=torch.float64, device=device)
    scratch = BlockScratch().words("cuda", states, True) if device == "cuda" else None
    state = empty_block_state(3, torch.device(device), 2)
    return *state, states, kinds, 0, 1, 4, True, sums, scratch


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(masked: bool, dtype: torch.dtype, block_backend: str, device: str) -> None:
    overload = getattr(_ops.ops.accumulate_blocks, block_backend)
    inputs = operands(dtype, device, masked)
    assert set(torch.library.opcheck(overload, inputs, test_utils=CHECKS).values()) == {"SUCCESS"}


def test_compiled_equals_eager(block_backend: str, device: str) -> None:
    def layers_and_blocks(moments: Tensor, counts: Tensor, first: Tensor, mask: Tensor) -> Tensor:
        states = [first, first * 2, first + 1]
        operator = getattr(_ops.ops.accumulate_blocks, block_backend)
        words = scratch.words(block_backend, states, False)
        operator(moments, counts, states, ops.as_kinds(mask), scratch=words)
        return states[-1]

    scratch = BlockScratch()
    found = [empty_block_state(2, torch.device(device)) for _ in range(2)]
    first = torch.randn(2, 9, 40, device=device)
    mask = torch.rand(2, 9, device=device) > 0.4
    layers_and_blocks(*found[0], first, mask)
    torch.compile(layers_and_blocks, fullgraph=True)(*found[1], first, mask)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_operator_tolerates_no_tokens(block_backend: str, device: str) -> None:
    moments, counts = empty_block_state(1, torch.device(device))
    operator = getattr(_ops.ops.accumulate_blocks, block_backend)
    operator(moments, counts, [torch.empty(2, 0, 16, device=device)] * 2, None)
    assert not moments.any()
    assert not counts.any()
    assert (*METRICS[:4], "angular_distance") == BLOCK_METRICS
