"""What only a GPU can show: streams, graphs, allocations, synchronisation, memory that runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from simdiff_kernels import RunningBlockScores, RunningScores, token_metrics
from simdiff_kernels.backends import backend_status
from simdiff_kernels.ops import has_implementation
from simdiff_kernels.testing import check_metrics, joined_state, near, walk

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    status = {entry.name: entry for entry in backend_status()}[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.detail}")
    return request.param


def pair(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> list[Tensor]:
    states = near(shape, 0.05, dtype=dtype)(torch.Generator().manual_seed(sum(shape)))
    return [tensor.to(device) for tensor in states]


@contextlib.contextmanager
def no_free_memory() -> Iterator[None]:
    """Less than 8 MB in one piece, neither on the device nor in the allocator's own pool."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    taken: list[Tensor] = []
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(8 << 20, dtype=torch.uint8, device="cuda"))
        yield
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def states_of(scores: RunningScores) -> tuple[Tensor, Tensor]:
    state = scores.state_dict()
    return state["moments"], state["counts"]


def check_equal(left: RunningScores, right: RunningScores) -> None:
    for mine, theirs in zip(states_of(left), states_of(right), strict=True):
        assert torch.equal(mine, theirs)


def test_an_update_never_waits_for_the_device(gpu_backend: str) -> None:
    scores = RunningScores(1, backend=gpu_backend)
    before, after = pair(8, 512, 1024)
    mask = torch.ones(8, 512, dtype=torch.bool, device="cuda")
    scores.update(0, before, after, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores.update(0, before, after, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scores.finish().num_tokens.tolist() == [2 * 8 * 512]


def test_later_updates_allocate_nothing(gpu_backend: str) -> None:
    scores = RunningScores(1, backend=gpu_backend)
    before, after = pair(8, 512, 576)
    scores.update(0, before, after)
    torch.cuda.synchronize()
    start = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        scores.update(0, before, after)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == start


def test_a_replayed_graph_adds_what_an_update_adds(gpu_backend: str) -> None:
    captured, eager = (RunningScores(1, backend=gpu_backend) for _ in range(2))
    before, after = pair(4, 300, 1024)
    for scores in (captured, eager):
        scores.update(0, before, after)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, does not run
        captured.update(0, before, after)
    for seed in range(3):
        fresh = pair(4, 300, 1024 + 0 * seed)
        before.copy_(fresh[0] * (1 + seed))
        after.copy_(fresh[1])
        graph.replay()
        eager.update(0, before, after)
    check_equal(captured, eager)


def test_work_goes_to_the_current_stream(gpu_backend: str) -> None:
    before, after = pair(16, 512, 4096)
    scores, wanted = (RunningScores(1, backend=gpu_backend) for _ in range(2))
    wanted.update(0, before * 3, after)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # another stream would read before what follows is written
        tripled = before * 3
        scores.update(0, tripled, after)
    stream.synchronize()
    check_equal(scores, wanted)


def test_bitwise_the_same_in_every_run(gpu_backend: str) -> None:
    before, after = pair(16, 2048, 1024)
    runs = []
    for _ in range(10):
        scores = RunningScores(1, backend=gpu_backend)
        scores.update(0, before, after)
        runs.append(scores)
    for scores in runs[1:]:
        check_equal(runs[0], scores)


def test_every_device_is_used_where_its_tensors_live(gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    scores, wanted = (RunningScores(2, backend=gpu_backend) for _ in range(2))
    for layer in range(2):
        scores.update(layer, *pair(4, 128, 1024, device=f"cuda:{layer}"))
        wanted.update(layer, *pair(4, 128, 1024))
    assert torch.cuda.current_device() == 0
    check_equal(scores, wanted)


def test_running_out_of_memory_leaves_the_state(gpu_backend: str) -> None:
    scores = RunningScores(2, keep_tokens=True, backend=gpu_backend)
    before, after = pair(4, 2048, 1024)
    scores.update(0, before, after)
    earlier = states_of(scores)
    strided = before.transpose(1, 2), after.transpose(1, 2)  # two copies of 16 MB are needed
    with no_free_memory(), pytest.raises(torch.OutOfMemoryError):
        scores.update(1, *strided)
    for mine, theirs in zip(states_of(scores), earlier, strict=True):
        assert torch.equal(mine[0], theirs[0])
    scores.update(0, before, after)
    assert int(scores.state_dict()["counts"][0, 0, -1]) == 2 * 4 * 2048


def test_more_than_two_billion_elements(gpu_backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    rows = 2**31 // 4096 + 3
    before, after = (torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    first, second = pair(3, 4096)
    before[-3:], after[-3:] = first, second
    result = token_metrics(before, after, backend=gpu_backend)
    last = type(result)(*(values[-3:].cpu() for values in result))
    check_metrics(last, first.cpu(), second.cpu())
    scores = RunningScores(1, backend=gpu_backend)
    scores.update(0, before, after)
    assert int(scores.finish()["squared_difference"].argmax) >= rows - 3


def walk_on_gpu(num_states: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    states = walk(num_states - 1, shape, 0.2)(torch.Generator().manual_seed(sum(shape)))
    return [state.to(dtype).cuda() for state in states]


@pytest.fixture
def block_backend(gpu_backend: str) -> str:
    if not has_implementation("accumulate_blocks", gpu_backend, torch.device("cuda")):
        pytest.skip(f"backend {gpu_backend} has no accumulate_blocks")
    return gpu_backend


def check_equal_blocks(left: RunningBlockScores, right: RunningBlockScores) -> None:
    ours, theirs = joined_state(left), joined_state(right)
    for key in ("moments", "counts"):
        assert torch.equal(ours[key], theirs[key])


def test_blocks_against_the_reference(block_backend: str) -> None:
    states = walk_on_gpu(33, 4, 300, 4096)
    mask = torch.rand(4, 300, generator=torch.Generator().manual_seed(1)).cuda() > 0.2
    states[7][1, 2, 3] = torch.nan
    found, wanted = (RunningBlockScores(32, backend=name) for name in (block_backend, "reference"))
    for scores in (found, wanted):
        scores.update(states, mask)
    ours, theirs = joined_state(found), joined_state(wanted)
    assert torch.equal(ours["counts"], theirs["counts"])
    assert torch.allclose(ours["moments"], theirs["moments"], rtol=1e-6, atol=0)


def test_blocks_never_wait_nor_allocate(block_backend: str) -> None:
    scores, states = RunningBlockScores(8, backend=block_backend), walk_on_gpu(9, 8, 512, 1024)
    mask = torch.ones(8, 512, dtype=torch.bool, device="cuda")
    scores.update(states, mask)
    torch.cuda.synchronize()
    start = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores.update(states, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == start
    assert scores.finish().num_tokens == 2 * 8 * 512


def test_blocks_in_a_replayed_graph(block_backend: str) -> None:
    captured, eager = (RunningBlockScores(4, backend=block_backend) for _ in range(2))
    states = walk_on_gpu(5, 4, 300, 576)
    for scores in (captured, eager):
        scores.update(states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, does not run
        captured.update(states)
    for factor in (2, 3):
        states[1].mul_(factor)
        graph.replay()
        eager.update(states)
    check_equal_blocks(captured, eager)


def test_blocks_are_bitwise_the_same_in_every_run(block_backend: str) -> None:
    states, runs = walk_on_gpu(12, 8, 1024, 576), []
    for _ in range(5):
        scores = RunningBlockScores(11, backend=block_backend)
        scores.update(states)
        runs.append(scores)
    for scores in runs[1:]:
        check_equal_blocks(runs[0], scores)
