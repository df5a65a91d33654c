"""RunningBlockScores against the exact metrics of every pair, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simdiff_kernels import (
    BLOCK_METRICS,
    BlockSummary,
    NonFiniteError,
    RunningBlockScores,
    RunningScores,
    blocks,
    reference,
)
from simdiff_kernels.blocks import BlockScratch, accumulate_blocks
from simdiff_kernels.metrics import APART, COUNTED, LEFT_OUT
from simdiff_kernels.running_states import empty_block_state
from simdiff_kernels.testing import (
    BlockCase,
    block_cases,
    check_token_blocks,
    exact_block_metrics,
    exact_metrics,
    joined_state,
    walk,
    with_strides,
)

ABSOLUTE_MOMENTS = [2, 7]
"""Of the absolute difference, among the moments of a state: its sums, its sums of squares."""


@pytest.fixture
def device(block_backend: str) -> str:
    return "cuda" if block_backend == "cuda" else "cpu"


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
    names = [name for name in BLOCK_METRICS if getattr(summary, name) is not None]
    assert list(summary.standard_error) == names
    for i in range(num_states):
        for j in range(num_states):
            exact = [exact_block_metrics(states[i], states[j]) for states, _ in data]
            for name in names:
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
    for token in range(num_tokens):
        # The view keeps the strides of the case; the mask leaves one token of it.
        mask = torch.zeros(flat[0].shape[0], dtype=torch.bool)
        mask[token] = True
        found = []
        for absolute in (True, False):
            scores = RunningBlockScores(
                len(states) - 1, backend=block_backend, absolute_difference=absolute
            )
            scores.update(on(device, states), mask.view(states[0].shape[:-1]).to(device))
            state = joined_state(scores)
            assert state["counts"].tolist() == [1, 0, flat[0].shape[0]]
            found.append(state["moments"])
        short = block_backend != "reference"
        check_token_blocks(found[0], [h[token] for h in flat], short_sums=short)
        # Without it nothing else changes.
        found[0][ABSOLUTE_MOMENTS] = 0
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("absolute", [False, True], ids=["plain", "absolute"])
def test_summary(absolute: bool, block_backend: str, device: str) -> None:
    scores = RunningBlockScores(3, backend=block_backend, absolute_difference=absolute)
    data = batches()
    for states, mask in data:
        scores.update(on(device, states), mask.to(device))
    assert (scores.finish().absolute_difference is not None) == absolute
    check_summary(scores.finish(), data, block_backend)


def test_neighbours_are_the_layers(block_backend: str, device: str) -> None:
    """Entry [i, i + 1] is what `RunningScores` says of layer i."""
    (states, mask), *_ = batches()
    whole = RunningBlockScores(3, backend=block_backend, absolute_difference=True)
    layers = RunningScores(3)
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
        found.append(joined_state(scores))
    for state in found[1:]:
        assert torch.equal(state["moments"], found[0]["moments"])
        assert torch.equal(state["counts"], found[0]["counts"])


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
            found.append(joined_state(scores))
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
    got, wanted = joined_state(merged), joined_state(whole)
    assert torch.equal(got["counts"], wanted["counts"])
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
    assert torch.equal(resumed.state_dict()["counts"], whole.state_dict()["counts"])
    earlier = whole.state_dict()
    earlier["tallies"] = earlier.pop("counts")
    resumed = RunningBlockScores(3, backend=block_backend)
    resumed.load_state_dict(earlier)
    assert torch.equal(resumed.state_dict()["counts"], whole.state_dict()["counts"])


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


def kinds_and_states() -> tuple[Tensor, list[Tensor]]:
    """Tokens of all kinds, some of every kind not finite, with differences of every size."""
    generator = torch.Generator().manual_seed(2)
    states = [state.float() for state in walk(4, (7, 50, 72), 0.3)(generator)]
    states[1][0, :25] = states[0][0, :25]  # a layer that does nothing
    states[2][1] = states[1][1] * 1.0001  # one that hardly turns
    states[3][2] = states[2][2] + 1e-30  # one whose squared difference float32 does not hold
    kinds = torch.randint(3, (7, 50), generator=generator).to(torch.uint8)
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        for column in range(3):
            states[1 + row][3 + row, column, 9] = value
            kinds[3 + row, column] = (LEFT_OUT, COUNTED, APART)[column]
    return kinds, states


@pytest.mark.parametrize("absolute", [False, True], ids=["plain", "absolute"])
@pytest.mark.parametrize(
    ("first_state", "offset", "length"), [(0, 0, 50), (-1, 20, 70), (1, 349, 175), (0, 3, 1000)]
)
def test_running_states_are_updates_of_their_own(
    first_state: int, offset: int, length: int, absolute: bool, block_backend: str, device: str
) -> None:
    """One call for many groups of tokens, some of which belong to no running state."""
    kinds, states = kinds_and_states()
    num_running, num_tokens = 4, kinds.numel()
    found = empty_block_state(4, torch.device(device), num_running)
    accumulate_blocks(
        *found,
        on(device, states),
        kinds=kinds.to(device),
        first_state=first_state,
        offset=offset,
        tokens_per_state=length,
        absolute_difference=absolute,
        backend=block_backend,
    )
    own = (torch.arange(num_tokens) + offset) // length + first_state
    for running in range(num_running):
        tokens = own == running
        alone = RunningBlockScores(4, backend=block_backend, absolute_difference=absolute)
        if bool(tokens.any()):
            alone.update(
                on(device, [state.flatten(0, 1)[tokens] for state in states]),
                (kinds.flatten()[tokens] == COUNTED).to(device),
            )
        wanted = joined_state(alone)
        moments, counts = found[0][running].cpu(), found[1][running].tolist()
        assert torch.allclose(moments, wanted["moments"], rtol=1e-13, atol=0)
        if block_backend == "cpu":
            assert torch.equal(moments, wanted["moments"])
        assert counts == [*wanted["counts"][:2].tolist(), num_tokens]
        assert bool(moments[ABSOLUTE_MOMENTS].any()) == (absolute and counts[0] > 0)


@pytest.mark.parametrize("absolute", [False, True], ids=["plain", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_sums(dtype: torch.dtype, absolute: bool, block_backend: str, device: str) -> None:
    """Of every token but those left out, also of those that no running state counts."""
    kinds, states = kinds_and_states()
    states = [state.to(dtype) for state in states]
    state = empty_block_state(4, torch.device(device), 2)
    sums = torch.full((4, *kinds.shape, 4), -7.0, dtype=torch.float64, device=device)
    accumulate_blocks(
        *state,
        on(device, states),
        kinds=kinds.to(device),
        offset=20,
        tokens_per_state=150,
        absolute_difference=absolute,
        sums=sums,
        backend=block_backend,
    )
    for layer, got in enumerate(sums.cpu()):
        wanted = torch.empty_like(got)
        reference.row_sums(wanted, states[layer], states[layer + 1], kinds != LEFT_OUT)
        assert torch.allclose(got, wanted, rtol=52 / 4 * 2.0**-24, atol=0, equal_nan=True)
        errors = ((got - wanted) / wanted)[got.isfinite() & (wanted != 0)]
        assert errors.square().mean().sqrt() < 1e-7
        assert torch.equal(got == 0, wanted == 0)
        if device == "cpu":  # a GPU sums lengths in float32 as well
            assert torch.allclose(got[..., :2], wanted[..., :2], rtol=1e-14, atol=0, equal_nan=True)
    without = empty_block_state(4, torch.device(device), 2)
    accumulate_blocks(
        *without,
        on(device, states),
        kinds=kinds.to(device),
        offset=20,
        tokens_per_state=150,
        absolute_difference=absolute,
        backend=block_backend,
    )
    assert torch.equal(state[0], without[0])
    assert torch.equal(state[1], without[1])


def test_kinds(block_backend: str, device: str) -> None:
    """A batch without a mask, one in which all count, and one in which some only have sums."""
    (states, _), *_ = batches()
    kinds = torch.full(states[0].shape[:-1], COUNTED, dtype=torch.uint8)
    found = []
    for variant in (None, kinds, kinds.clone().index_fill_(1, torch.tensor([2, 9]), APART)):
        state = empty_block_state(3, torch.device(device))
        given = None if variant is None else variant.to(device)
        accumulate_blocks(*state, on(device, states), kinds=given, backend=block_backend)
        found.append((state[0].cpu(), state[1].cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].tolist() == found[1][1].tolist() == [[51, 0, 51]]
    assert found[2][1].tolist() == [[45, 0, 51]]
    masked = RunningBlockScores(3, backend=block_backend)
    masked.update(on(device, states), (variant == COUNTED).to(device))
    assert torch.allclose(found[2][0][0], joined_state(masked)["moments"], rtol=1e-14, atol=0)


def test_parts_are_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight parts, as on a GPU: what is read, merged and loaded is their sum, in order."""
    data = batches()
    one = RunningBlockScores(3, backend="cpu")
    resumed, merged = RunningBlockScores(3, backend="cpu"), RunningBlockScores(3, backend="cpu")
    for states, mask in data:
        one.update(states, mask)
    resumed.update(*data[0])
    merged.update(*data[0])
    monkeypatch.setattr(blocks, "num_block_parts", lambda backend: 8)
    parts, later = RunningBlockScores(3, backend="cpu"), RunningBlockScores(3, backend="cpu")
    for states, mask in data:
        parts.update(states, mask)
    for states, mask in data[1:]:
        later.update(states, mask)
    assert parts._moments is not None
    assert parts._counts is not None
    assert len(parts._moments) == 8
    assert parts._counts[:, 0].tolist() == [11, *[17] * 6, 8]
    loaded = RunningBlockScores(3, backend="cpu")
    loaded.load_state_dict(resumed.state_dict())
    for states, mask in data[1:]:
        loaded.update(states, mask)
    merged.merge(later)  # one part, then eight
    later.merge(resumed)  # eight parts, then one
    wanted = joined_state(one)
    for scores in (parts, loaded, merged, later):
        got = joined_state(scores)
        assert got["moments"].shape == (11, 4, 4)
        assert torch.equal(got["counts"], wanted["counts"])
        assert torch.equal(got["moments"][-1], wanted["moments"][-1])
        assert torch.allclose(got["moments"], wanted["moments"], rtol=1e-14, atol=0)
    check_summary(parts.finish(), data, "cpu")


def test_scratch_grows_with_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def words(backend: str, states: torch.Tensor, num_states: int, absolute: bool) -> int:
        asked.append((backend, len(states), num_states, absolute))
        return len(states)

    monkeypatch.setattr(blocks, "block_scratch_words", words)
    states = {count: [torch.zeros(count, 7)] * 4 for count in (5, 6, 9)}
    scratch = BlockScratch()
    assert scratch.words("cpu", states[6], True) is None
    first = scratch.words("cuda", states[6], True)
    assert first is not None
    assert first.shape == (6,)
    assert scratch.words("cuda", states[5], False) is first
    larger = scratch.words("cuda", states[9], False)
    assert larger is not None
    assert larger.shape == (9,)
    assert scratch.words("cuda", states[6], True) is larger
    assert asked[:2] == [("cuda", 6, 4, True), ("cuda", 5, 4, False)]
    scores = RunningBlockScores(3, backend="cpu", absolute_difference=True)
    scores.update(*batches()[0])
    other = scores.empty_like()
    assert other._scratch is scores._scratch
    assert (other.num_layers, other.backend, other.absolute_difference) == (3, "cpu", True)
    assert not joined_state(other)["moments"].any()


def test_a_state_of_version_1_holds_the_absolute_difference() -> None:
    scores = RunningBlockScores(3, backend="cpu", absolute_difference=True)
    scores.update(*batches()[0])
    old = {key: value for key, value in scores.state_dict().items() if key != "absolute_difference"}
    old |= joined_state(scores)  # there were no parts
    resumed = RunningBlockScores(3, absolute_difference=True)
    resumed.load_state_dict(old | {"version": 1})
    assert torch.equal(joined_state(resumed)["moments"], joined_state(scores)["moments"])
    with pytest.raises(ValueError, match="state must have absolute_difference=False, got True"):
        RunningBlockScores(3).load_state_dict(old | {"version": 1})


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
    with pytest.raises(ValueError, match="must have version 1 to 2"):
        scores.load_state_dict({**scores.state_dict(), "version": 3})
    with pytest.raises(ValueError, match="merge: other must have absolute_difference=False, got T"):
        scores.merge(RunningBlockScores(2, absolute_difference=True))
    with pytest.raises(ValueError, match="state must have absolute_difference=True, got False"):
        RunningBlockScores(2, absolute_difference=True).load_state_dict(scores.state_dict())
    with pytest.raises(ValueError, match="3 layers, got 2"):
        RunningBlockScores(3).load_state_dict(scores.state_dict())
    with pytest.raises(ValueError, match="backend must be one of"):
        RunningBlockScores(2, backend="fast").update(states)


def test_compiled_update_equals_eager() -> None:
    eager, compiled = RunningBlockScores(2), RunningBlockScores(2)
    update = torch.compile(compiled.update, fullgraph=True)
    for _ in range(3):
        states, mask = [torch.randn(4, 6, 32) for _ in range(3)], torch.rand(4, 6) > 0.3
        eager.update(states, mask)
        update(states, mask)
    assert torch.equal(eager.state_dict()["moments"], compiled.state_dict()["moments"])
