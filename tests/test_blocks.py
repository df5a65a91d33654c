"""RunningBlockScores and its operator against the exact metrics of every pair, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simdiff_kernels import (
    BLOCK_METRICS,
    METRICS,
    BlockSummary,
    NonFiniteError,
    RunningBlockScores,
    RunningScores,
    blocks,
    ops,
)
from simdiff_kernels.blocks import empty_block_state
from simdiff_kernels.testing import (
    BlockCase,
    block_cases,
    check_token_blocks,
    exact_block_metrics,
    exact_metrics,
    walk,
    with_strides,
)

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor",
          "test_aot_dispatch_dynamic")  # fmt: skip


@pytest.fixture
def block_backend(backend: str, device: str) -> str:
    """A backend that has the operator; reference and cpu must."""
    if not ops.has_implementation("accumulate_blocks", backend, torch.device(device)):
        assert backend not in ("reference", "cpu")
        pytest.skip(f"backend {backend} has no accumulate_blocks")
    return backend


def on(device: str, states: list[Tensor]) -> list[Tensor]:
    return [with_strides(state, device) for state in states]


def batches(num_layers: int = 3) -> list[tuple[list[Tensor], Tensor]]:
    """Three batches of unequal size, their masks padding on the left and on the right."""
    found = []
    for seed, (size, length) in enumerate(((3, 17), (1, 5), (2, 40))):
        generator = torch.Generator().manual_seed(seed)
        states = walk(num_layers, (size, length, 72), 0.3)(generator)
        states[1][..., 5] *= 100  # one layer writes a massive activation, the next one erases it
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, :3] = 0
        mask[-1, length - 2 :] = 0
        found.append(([state.float() for state in states], mask))
    return found


def check_summary(
    summary: BlockSummary, data: list[tuple[list[Tensor], Tensor]], backend: str
) -> None:
    """Means, standard errors and maxima of all pairs from the exact metrics of all tokens."""
    limit = 1e-12 if backend == "reference" else 52 / 4 * 2.0**-24
    num_states = len(data[0][0])
    mask = torch.cat([mask.flatten() for _, mask in data]).bool()
    assert summary.num_tokens == mask.sum()
    for i in range(num_states):
        for j in range(num_states):
            exact = [exact_block_metrics(states[i], states[j]) for states, _ in data]
            for name in BLOCK_METRICS:
                values = torch.cat([metrics[name].flatten() for metrics in exact])[mask]
                wanted = values.mean().item() if i < j else 0.0
                error = values.std().item() / len(values) ** 0.5 if i < j else 0.0
                assert getattr(summary, name)[i, j] == pytest.approx(wanted, rel=limit)
                # Values off by `limit` change their variance by twice as much of their squares.
                spread = 2 * limit * (values.square().mean() / values.var()).item()
                near = pytest.approx(error, rel=max(1e-6, spread) if i < j else 0)
                assert summary.standard_error[name][i, j] == near
                if name == "squared_difference":
                    peak = values.max().item() if i < j else 0.0
                    got = summary.squared_difference_maximum[i, j]
                    assert got == pytest.approx(peak, rel=limit)


@pytest.mark.parametrize("case", block_cases(), ids=str)
def test_against_exact(case: BlockCase, block_backend: str, device: str) -> None:
    states = case.states()
    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    num_tokens = flat[0].shape[0]
    if block_backend == "triton" and device == "cpu":  # Triton's interpreter takes its time
        if case.dtype in (torch.float16, torch.float64):
            pytest.skip("tests/ptx executes these dtypes as compiled")
        num_tokens = num_tokens if case.name == "zero-vectors" else 1
    for token in range(num_tokens):
        # The view keeps the strides of the case; the mask leaves one token of it.
        mask = torch.zeros(flat[0].shape[0], dtype=torch.bool)
        mask[token] = True
        scores = RunningBlockScores(len(states) - 1, backend=block_backend)
        scores.update(on(device, states), mask.view(states[0].shape[:-1]).to(device))
        state = scores.state_dict()
        assert state["tallies"].tolist() == [1, 0, flat[0].shape[0]]
        short = block_backend != "reference"
        check_token_blocks(state["moments"], [h[token] for h in flat], short_sums=short)


def test_summary(block_backend: str, device: str) -> None:
    scores, data = RunningBlockScores(3, backend=block_backend), batches()
    for states, mask in data:
        scores.update(on(device, states), mask.to(device))
    check_summary(scores.finish(), data, block_backend)


def test_neighbours_are_the_layers(block_backend: str, device: str) -> None:
    """Entry [i, i + 1] is what `RunningScores` says of layer i."""
    (states, mask), *_ = batches()
    whole, layers = RunningBlockScores(3, backend=block_backend), RunningScores(3)
    whole.update(on(device, states), mask.to(device))
    for layer in range(3):
        layers.update(layer, states[layer], states[layer + 1], mask)
    summary, wanted = whole.finish(), layers.finish()
    for name in BLOCK_METRICS[:-1]:
        got = getattr(summary, name).diagonal(1)
        assert torch.allclose(got, wanted[name].mean, rtol=1e-6, atol=0)
    peaks = summary.squared_difference_maximum.diagonal(1)
    assert torch.allclose(peaks, wanted["squared_difference"].maximum, rtol=1e-6, atol=0)


def test_mask_dtypes_and_strides_agree(block_backend: str, device: str) -> None:
    (states, mask), *_ = batches()
    found = []
    for variant in (mask, mask.bool(), mask.to(torch.uint8) * 7, mask.t().contiguous().t()):
        scores = RunningBlockScores(3, backend=block_backend)
        scores.update(on(device, states), variant.to(device))
        found.append(scores.state_dict())
    for state in found[1:]:
        assert torch.equal(state["moments"], found[0]["moments"])
        assert torch.equal(state["tallies"], found[0]["tallies"])


@pytest.mark.parametrize(("num_layers", "num_tokens"), [(3, 7000), (60, 5000)])
def test_bitwise_the_same_for_any_number_of_threads(num_layers: int, num_tokens: int) -> None:
    """Many chunks of the CPU; with 61 states they do not all wait at once to be joined."""
    generator = torch.Generator().manual_seed(5)
    states = [torch.randn(num_tokens, 24, generator=generator) for _ in range(num_layers + 1)]
    mask = torch.rand(num_tokens, generator=generator) > 0.2
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            scores = RunningBlockScores(num_layers, backend="cpu")
            scores.update(states, mask)
            found.append(scores.state_dict())
    finally:
        torch.set_num_threads(threads)
    for state in found[1:]:
        assert torch.equal(state["moments"], found[0]["moments"])
    # All of them are there: the first pair and the last one, as one layer each.
    layers = RunningScores(2)
    layers.update(0, states[0], states[1], mask)
    layers.update(1, states[-2], states[-1], mask)
    for layer, (i, j) in enumerate(((0, 1), (num_layers - 1, num_layers))):
        wanted = layers.finish()["squared_difference"]
        summary = scores.finish()
        assert summary.num_tokens == mask.sum()
        assert summary.squared_difference[i, j] == pytest.approx(wanted.mean[layer].item())
        assert summary.squared_difference_maximum[i, j] == pytest.approx(wanted.maximum[layer])


def test_merge_is_the_same_as_one_pass(block_backend: str, device: str) -> None:
    data = batches()
    whole, parts = RunningBlockScores(3, backend=block_backend), []
    for states, mask in data:
        part = RunningBlockScores(3, backend=block_backend)
        for scores in (whole, part):
            scores.update(on(device, states), mask.to(device))
        parts.append(part)
    merged = RunningBlockScores(3)
    for part in (RunningBlockScores(3), *parts):
        merged.merge(part)
    got, wanted = merged.state_dict(), whole.state_dict()
    assert torch.equal(got["tallies"], wanted["tallies"])
    assert torch.equal(got["moments"][-1], wanted["moments"][-1])
    assert torch.allclose(got["moments"], wanted["moments"], rtol=1e-14, atol=0)


def test_state_dict_round_trip(block_backend: str, device: str, tmp_path: Any) -> None:
    data = batches()
    whole, first = (RunningBlockScores(3, backend=block_backend) for _ in range(2))
    for states, mask in data:
        whole.update(on(device, states), mask.to(device))
    first.update(on(device, data[0][0]), data[0][1].to(device))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = RunningBlockScores(3, backend=block_backend)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for states, mask in data[1:]:
        resumed.update(on(device, states), mask.to(device))
    assert torch.equal(resumed.state_dict()["moments"], whole.state_dict()["moments"])
    assert torch.equal(resumed.state_dict()["tallies"], whole.state_dict()["tallies"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_tokens_are_left_out_of_all_pairs(
    value: float, block_backend: str, device: str
) -> None:
    (states, mask), *_ = batches()
    mask = torch.ones_like(mask)
    bad = [state.clone() for state in states]
    bad[0][0, 5, 71] = bad[2][0, 5, 0] = value  # one token, twice
    bad[3][2, 1, 3] = value
    bad[1][1, 7, 3] = value
    mask[1, 7] = 0  # masked: neither averaged nor counted as not finite
    scores = RunningBlockScores(3, backend=block_backend)
    scores.update(on(device, bad), mask.to(device))
    with pytest.raises(NonFiniteError, match="NaN or Inf in 2 of 51 tokens"):
        scores.finish()
    summary = scores.finish(allow_nonfinite=True)
    assert summary.num_nonfinite == 2
    mask[0, 5] = mask[2, 1] = 0
    check_summary(summary, [(states, mask)], block_backend)


def test_one_token_has_no_standard_error(block_backend: str, device: str) -> None:
    scores = RunningBlockScores(2, backend=block_backend)
    scores.update(on(device, [torch.randn(8) for _ in range(3)]))
    for error in scores.finish().standard_error.values():
        assert error[0, 1].isnan()
        assert error[0, 2].isnan()
        assert error[1, 0] == 0


def test_neighbouring_floats_are_told_apart() -> None:
    """One entry moved by one unit in its last place: |d| / |x| is 2e-9, far below float32's."""
    first = torch.randn(2, 576, generator=torch.Generator().manual_seed(1))
    second = first.clone()
    second[:, 100] = torch.nextafter(first[:, 100], torch.tensor(torch.inf))
    for token in range(2):
        scores = RunningBlockScores(1, backend="cpu")
        scores.update([first[token], second[token]])
        states = [first[token], second[token]]
        exact = exact_metrics(*states)
        got = scores.finish().cosine_distance[0, 1]
        assert got == pytest.approx(exact.cosine_distance.item(), rel=1e-6)


def test_bad_input() -> None:
    scores, states = RunningBlockScores(2), [torch.randn(2, 3, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=r"states must be 3 tensors.*of 2 layers, got 2"):
        scores.update(states[:2])
    with pytest.raises(ValueError, match=r"states\[2\] must have shape \(2, 3, 8\) like states\[0"):
        scores.update([*states[:2], states[2][:1]])
    with pytest.raises(ValueError, match=r"states\[1\] must be torch.float32 like states\[0\]"):
        scores.update([states[0], states[1].double(), states[2]])
    with pytest.raises(TypeError, match=r"states\[0\] must be float32.*got torch.int64"):
        scores.update([state.long() for state in states])
    with pytest.raises(TypeError, match=r"states\[2\] must be a tensor, got list"):
        scores.update([*states[:2], [1.0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\).*states\[0\], got \(2, 4"):
        scores.update(states, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool or integer.*torch.float32"):
        scores.update(states, torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one token to average, got 0 seen"):
        scores.finish()
    scores.update(states, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="got 6 seen, of which 0 not finite and all others masked"):
        scores.finish()
    with pytest.raises(ValueError, match="2 layers, got 3"):
        scores.merge(RunningBlockScores(3))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        RunningBlockScores(0)
    with pytest.raises(ValueError, match="must have version 1"):
        scores.load_state_dict({**scores.state_dict(), "version": 2})
    with pytest.raises(ValueError, match="3 layers, got 2"):
        RunningBlockScores(3).load_state_dict(scores.state_dict())
    with pytest.raises(ValueError, match="backend must be one of"):
        RunningBlockScores(2, backend="fast").update(states)


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
    mask = torch.tensor([[True, True, False]] * 2, device=device) if masked else None
    return *empty_block_state(3, torch.device(device)), states, mask


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(masked: bool, dtype: torch.dtype, block_backend: str, device: str) -> None:
    overload = getattr(torch.ops.simdiff_kernels.accumulate_blocks, block_backend)
    inputs = operands(dtype, device, masked)
    assert set(torch.library.opcheck(overload, inputs, test_utils=CHECKS).values()) == {"SUCCESS"}


def test_compiled_equals_eager(block_backend: str, device: str) -> None:
    def layers_and_blocks(moments: Tensor, tallies: Tensor, first: Tensor, mask: Tensor) -> Tensor:
        states = [first, first * 2, first + 1]
        operator = getattr(torch.ops.simdiff_kernels.accumulate_blocks, block_backend)
        operator(moments, tallies, states, mask)
        return states[-1]

    found = [empty_block_state(2, torch.device(device)) for _ in range(2)]
    first = torch.randn(2, 9, 40, device=device)
    mask = torch.rand(2, 9, device=device) > 0.4
    layers_and_blocks(*found[0], first, mask)
    torch.compile(layers_and_blocks, fullgraph=True)(*found[1], first, mask)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_compiled_update_equals_eager() -> None:
    eager, compiled = RunningBlockScores(2), RunningBlockScores(2)
    update = torch.compile(compiled.update, fullgraph=True)
    for _ in range(3):
        states, mask = [torch.randn(4, 6, 32) for _ in range(3)], torch.rand(4, 6) > 0.3
        eager.update(states, mask)
        update(states, mask)
    assert torch.equal(eager.state_dict()["moments"], compiled.state_dict()["moments"])


def test_operator_tolerates_no_tokens(block_backend: str, device: str) -> None:
    moments, tallies = empty_block_state(1, torch.device(device))
    operator = getattr(torch.ops.simdiff_kernels.accumulate_blocks, block_backend)
    operator(moments, tallies, [torch.empty(2, 0, 16, device=device)] * 2, None)
    assert not moments.any()
    assert not tallies.any()
    assert (*METRICS[:4], "angular_distance") == BLOCK_METRICS
