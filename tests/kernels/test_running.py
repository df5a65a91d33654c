"""RunningScores against the per-token metrics of the same tokens, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simdiff_kernels import METRICS, NonFiniteError, RunningScores, RunningSummary
from simdiff_kernels.testing import exact_metrics, joined_state, near


def uneven(shape: tuple[int, ...], distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """States with a massive channel whose tokens change by unequal amounts."""
    generator = torch.Generator().manual_seed(seed)
    before, after = near(shape, distance, massive=True)(generator)
    share = torch.rand(*shape[:-1], 1, generator=generator)
    return before, torch.lerp(before, after, share)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Three batches of unequal size, their masks padding on the left and on the right."""
    found = []
    for seed, (size, length) in enumerate(((3, 17), (1, 5), (2, 40))):
        before, after = (x.to(dtype) for x in uneven((size, length, 72), 0.02, seed))
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, :3] = 0
        mask[-1, length - 2 :] = 0
        found.append((before, after, mask))
    return found


def check_summary(
    summary: RunningSummary, layer: int, data: list[tuple[Tensor, ...]], backend: str
) -> None:
    """Mean, standard error, maximum and its token from all tokens at once."""
    # At most 52 additions are made in float32 before a sum is widened.
    short = backend != "reference" and data[0][0].dtype != torch.float64
    limit = 52 / 4 * 2.0**-24 if short else 1e-12
    exact = [exact_metrics(before, after) for before, after, _ in data]
    mask = torch.cat([mask.flatten() for *_, mask in data]).bool()
    assert summary.num_tokens[layer] == mask.sum()
    for m, name in enumerate(METRICS):
        values = torch.cat([metrics[m].flatten() for metrics in exact])
        kept, result = values[mask], summary[name]
        error = kept.std() / len(kept) ** 0.5
        assert result.mean[layer] == pytest.approx(kept.mean().item(), rel=limit)
        assert result.standard_error[layer] == pytest.approx(error.item(), rel=1e-6)
        assert result.maximum[layer] == pytest.approx(kept.max().item(), rel=limit)
        assert result.argmax[layer] == values.where(mask, -1).argmax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_summary(dtype: torch.dtype, backend: str, device: str) -> None:
    scores = RunningScores(2, backend=backend)
    data = batches(dtype)
    for before, after, mask in data:
        scores.update(0, before.to(device), after.to(device), mask.to(device))
        scores.update(1, after.to(device), before.to(device))
    summary = scores.finish()
    check_summary(summary, 0, data, backend)
    check_summary(summary, 1, [(a, b, torch.ones_like(mask)) for b, a, mask in data], backend)


def test_many_tokens(backend: str, device: str) -> None:
    """More tokens than one chunk of the CPU takes, and several for each part of a GPU's state."""
    before, after = uneven((5, 2800 if backend == "cpu" else 70, 40), 0.1, seed=3)
    mask = torch.rand(before.shape[:2], generator=torch.Generator().manual_seed(4)) > 0.3
    scores = RunningScores(1, backend=backend)
    scores.update(0, before.to(device), after.to(device), mask.to(device))
    check_summary(scores.finish(), 0, [(before, after, mask)], backend)


def test_the_backend_may_change(backend: str, device: str) -> None:
    """A state moves from one part to many, or back, with the update that needs it."""
    data = batches()
    scores = RunningScores(1)
    for i, (before, after, mask) in enumerate(data):
        scores.backend = backend if i == 1 else "reference"
        place = device if i == 1 else "cpu"
        scores.update(0, before.to(place), after.to(place), mask.to(place))
    check_summary(scores.finish(), 0, data, backend)


def test_mask_dtypes_and_strides_agree(backend: str, device: str) -> None:
    before, after, mask = (tensor.to(device) for tensor in batches()[0])
    states = []
    for variant in (mask, mask.bool(), mask.to(torch.uint8) * 7, mask.t().contiguous().t()):
        scores = RunningScores(1, backend=backend)
        scores.update(0, before, after, variant)
        states.append(scores.state_dict())
    for state in states[1:]:
        assert torch.equal(state["moments"], states[0]["moments"])
        assert torch.equal(state["counts"], states[0]["counts"])


def test_bitwise_the_same_in_every_run_and_for_any_number_of_threads() -> None:
    before, after = uneven((40, 300, 96), 0.1, seed=5)
    threads, states = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            scores = RunningScores(1, backend="cpu")
            scores.update(0, before, after)
            states.append(scores.state_dict()["moments"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(state, states[0]) for state in states)


def test_merge_is_the_same_as_one_pass(backend: str, device: str) -> None:
    data = batches()
    whole, parts = RunningScores(3, backend=backend), []
    for before, after, mask in data:
        part = RunningScores(3, backend=backend)
        for scores in (whole, part):
            scores.update(1, before.to(device), after.to(device), mask.to(device))
            scores.update(2, after.to(device), before.to(device))
        parts.append(part)
    first = parts[0]
    first.merge(parts[1])
    first.merge(parts[2])
    merged, wanted = joined_state(first), joined_state(whole)
    assert torch.equal(merged["counts"], wanted["counts"])
    assert torch.equal(merged["moments"][:, 2], wanted["moments"][:, 2])
    assert torch.allclose(merged["moments"], wanted["moments"], rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="layer 0 must have at least one token.*got 0 seen"):
        first.finish()


def test_ties_name_the_earliest_token(backend: str, device: str) -> None:
    before = torch.randn(1, 1, 24, device=device).repeat(1, 30, 1)
    scores = RunningScores(1, backend=backend)
    mask = torch.ones(1, 30, dtype=torch.bool, device=device)
    mask[0, :4] = False
    for _ in range(2):
        scores.update(0, before, before * 2, mask)
    assert scores.finish()["squared_difference"].argmax.tolist() == [4]


def test_state_dict_round_trip(backend: str, device: str, tmp_path) -> None:
    data = [tuple(tensor.to(device) for tensor in batch) for batch in batches()]
    whole, first = (RunningScores(1, backend=backend, keep_tokens=True) for _ in range(2))
    for before, after, mask in data:
        whole.update(0, before, after, mask)
    first.update(0, *data[0])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = RunningScores(1, backend=backend, keep_tokens=True)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for before, after, mask in data[1:]:
        resumed.update(0, before, after, mask)
    assert torch.equal(resumed.state_dict()["moments"], whole.state_dict()["moments"])
    assert torch.equal(resumed.state_dict()["counts"], whole.state_dict()["counts"])
    earlier = whole.state_dict()
    earlier["tallies"] = earlier.pop("counts")
    resumed = RunningScores(1, backend=backend, keep_tokens=True)
    resumed.load_state_dict(earlier)
    assert torch.equal(resumed.state_dict()["counts"], whole.state_dict()["counts"])
    assert torch.equal(resumed.tokens(0)[0].cpu(), whole.tokens(0)[0].cpu())


def test_kept_tokens_are_those_of_token_metrics(backend: str, device: str) -> None:
    from simdiff_kernels import token_metrics

    scores = RunningScores(1, backend=backend, keep_tokens=True)
    wanted = []
    for before, after, mask in batches():
        before, after = before.to(device), after.to(device)
        scores.update(0, before, after, mask.to(device))
        wanted.append(token_metrics(before, after, backend=backend))
    for m, values in enumerate(scores.tokens(0)):
        assert torch.equal(values, torch.cat([metrics[m].flatten() for metrics in wanted]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_tokens_are_counted_and_left_out(value: float, backend: str, device: str) -> None:
    before, after, _ = batches()[0]
    bad_before, bad_after = before.clone(), after.clone()
    bad_before[0, 5, 71] = value
    bad_after[2, 1, 0] = value
    bad_after[1, 7, 3] = value
    mask = torch.ones(3, 17, dtype=torch.bool)
    mask[1, 7] = False  # masked: neither averaged nor counted as not finite
    scores = RunningScores(2, backend=backend)
    scores.update(0, before.to(device), after.to(device))
    scores.update(1, bad_before.to(device), bad_after.to(device), mask.to(device))
    with pytest.raises(NonFiniteError, match="NaN or Inf in layer 1: 2 of 51 tokens") as caught:
        scores.finish()
    assert caught.value.tokens_by_layer == {1: 2}
    mask[0, 5] = mask[2, 1] = False
    summary = scores.finish(allow_nonfinite=True)
    check_summary(summary, 1, [(before, after, mask)], backend)
    assert summary.num_nonfinite.tolist() == [0, 2]


def test_one_token_has_no_standard_error() -> None:
    scores = RunningScores(1)
    scores.update(0, torch.randn(1, 8), torch.randn(1, 8))
    assert scores.finish()["cosine_distance"].standard_error.isnan().all()


def test_memory_does_not_grow_with_the_number_of_tokens() -> None:
    scores = RunningScores(1)
    scores.update(0, torch.randn(10, 8), torch.randn(10, 8))
    state = scores.state_dict()
    scores.update(0, torch.randn(10_000, 8), torch.randn(10_000, 8))
    for key in ("moments", "counts"):
        assert scores.state_dict()[key].shape == state[key].shape
    assert sum(state[key].numel() * 8 for key in ("moments", "counts")) == 216


def test_bad_input() -> None:
    scores, states = RunningScores(2), torch.randn(2, 3, 8)
    with pytest.raises(IndexError, match="0 to 1, got 2"):
        scores.update(2, states, states)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\).*got \(2, 4\)"):
        scores.update(0, states, states, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool or integer.*torch.float32"):
        scores.update(0, states, states, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"after must have shape \(2, 3, 8\)"):
        scores.update(0, states, states[:1])
    assert all(count == 0 for count in scores.state_dict()["counts"][..., -3:].flatten())
    scores.update(0, states, states, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 0 must have.*6 seen, of which 0 not finite and"):
        scores.finish()
    with pytest.raises(ValueError, match="2 layers, got 3"):
        scores.merge(RunningScores(3))
    with pytest.raises(ValueError, match="keep_tokens=False, got True"):
        scores.merge(RunningScores(2, keep_tokens=True))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        RunningScores(0)
    state = scores.state_dict()
    with pytest.raises(ValueError, match="must have version 2"):
        scores.load_state_dict({**state, "version": 1})
    with pytest.raises(ValueError, match="3 layers, got 2"):
        RunningScores(3).load_state_dict(state)


def test_running_out_of_memory_leaves_the_state(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an update allocates, it allocates before it changes anything."""
    before, after, mask = (tensor.to(device) for tensor in batches()[0])
    scores = RunningScores(1, keep_tokens=True, backend=backend)
    scores.update(0, before, after, mask)
    earlier = scores.state_dict()

    def no_memory(*arguments: object, **keywords: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    allocations = [(Tensor, "new_empty"), (Tensor, "contiguous")]
    if backend in ("triton", "cuda"):
        allocations.append((torch, "empty"))  # scratch memory
    for owner, name in allocations:
        scores._scratch = [[]]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, no_memory)
            with pytest.raises(torch.OutOfMemoryError):
                scores.update(0, before.transpose(1, 2), after.transpose(1, 2))
        for key in ("moments", "counts"):
            assert torch.equal(scores.state_dict()[key], earlier[key])
        assert torch.equal(scores.state_dict()["tokens"][0], earlier["tokens"][0])
    scores.update(0, before, after, mask)
    assert scores.finish().num_tokens.tolist() == [2 * int(mask.sum())]
