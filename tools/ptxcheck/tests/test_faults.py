"""Kernels with one mistake each: the mistake is named, and the repaired twin runs clean."""

from __future__ import annotations

import numpy as np
import pytest

from ptxcheck import FaultError, Gpu, Kind, Report
from ptxcheck.compilers import find_nvcc, nvcc_ptx

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

# Each kernel exists as `name` (WRONG = false) and `name_wrong`.
CUDA = r"""
template <bool WRONG> __device__ void reduce_cta(const float* x, float* out) {
    __shared__ float sums[4];
    float sum = x[blockIdx.x * 128 + threadIdx.x];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    if (!WRONG) __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
}

template <bool WRONG> __device__ void reuse_shared(const float* x, float* out) {
    __shared__ float last;
    for (int round = 0; round < 3; ++round) {
        if (threadIdx.x == 127) last = x[128 * round + 127];
        __syncthreads();
        out[128 * round + threadIdx.x] = x[128 * round + threadIdx.x] - last;
        if (!WRONG) __syncthreads();
    }
}

template <bool WRONG> __device__ void tail(const float* x, float* out, int n) {
    for (int i = threadIdx.x; WRONG ? i <= n : i < n; i += blockDim.x) out[i] = 2 * x[i];
}

template <bool WRONG> __device__ void strided(const float* x, float* out, int n, int stride) {
    const float* row = x + (long long)blockIdx.x * (WRONG ? n + 8 : stride);
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += row[i];
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <bool WRONG>
__device__ void huge_row(const unsigned short* x, unsigned short* out, int row, int n) {
    long long start = WRONG ? (long long)(row * n) : (long long)row * n;
    out[threadIdx.x] = x[start + threadIdx.x];
}

template <bool WRONG> __device__ void shared_bounds(float* out) {
    __shared__ float first[128], second[128];
    first[threadIdx.x] = 1;
    second[threadIdx.x] = 2;
    __syncthreads();
    out[threadIdx.x] = first[threadIdx.x + (WRONG ? 1 : 0)] + second[127 - threadIdx.x];
}

template <bool WRONG> __device__ void unwritten_shared(float* out) {
    __shared__ float values[128];
    if (threadIdx.x < (WRONG ? 127 : 128)) values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = values[127 - threadIdx.x];
}

template <bool WRONG> __device__ void warp_exchange(float* out) {
    __shared__ volatile float values[128];
    values[threadIdx.x] = threadIdx.x;
    if (!WRONG) __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <bool WRONG> __device__ void early_return(float* out, int n) {
    __shared__ float values[128];
    if (WRONG && threadIdx.x >= n) return;
    values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x < n) out[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <bool WRONG> __device__ void count_ctas(unsigned* out) {
    if (threadIdx.x == 0) {
        if (WRONG) *out += 1; else atomicAdd(out, 1u);
    }
}

#define PAIR(name, parameters, ...) \
    extern "C" __global__ void name parameters { name<false>(__VA_ARGS__); } \
    extern "C" __global__ void name##_wrong parameters { name<true>(__VA_ARGS__); }
PAIR(reduce_cta, (const float* x, float* out), x, out)
PAIR(reuse_shared, (const float* x, float* out), x, out)
PAIR(tail, (const float* x, float* out, int n), x, out, n)
PAIR(strided, (const float* x, float* out, int n, int stride), x, out, n, stride)
PAIR(huge_row, (const unsigned short* x, unsigned short* out, int row, int n), x, out, row, n)
PAIR(shared_bounds, (float* out), out)
PAIR(unwritten_shared, (float* out), out)
PAIR(warp_exchange, (float* out), out)
PAIR(early_return, (float* out, int n), out, n)
PAIR(count_ctas, (unsigned* out), out)
"""


@pytest.fixture(scope="module")
def cuda() -> str:
    return nvcc_ptx(CUDA, "sm_80")


def both(ptx: str, name: str, run) -> Report:
    """Check that the right kernel is clean, and return the report of the wrong one."""
    run(Gpu(ptx, kernels=[name]), name, True)
    return run(Gpu(ptx, kernels=[f"{name}_wrong"]), f"{name}_wrong", False)


@needs_nvcc
def test_missing_barrier_after_the_warp_sums(cuda: str) -> None:
    x, out = np.arange(1024, dtype=np.float32), np.zeros(8, np.float32)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        args = [gpu.buffer(x), gpu.buffer(out)]
        return gpu.launch(name, 8, 128, args, check=check)

    report = both(cuda, "reduce_cta", run)
    # Lock step hides neither the race nor, here, the value that the barrier would have made safe.
    assert report.kinds() == {Kind.SHARED_RACE}
    fault = report.faults[0]
    assert fault.kernel == "reduce_cta_wrong"
    assert "shared" in fault.text
    assert fault.address is not None


@needs_nvcc
def test_missing_barrier_before_the_next_round(cuda: str) -> None:
    x, out = np.arange(384, dtype=np.float32), np.zeros(384, np.float32)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        return gpu.launch(name, 1, 128, [gpu.buffer(x), gpu.buffer(out)], check=check)

    assert both(cuda, "reuse_shared", run).kinds() == {Kind.SHARED_RACE}


@needs_nvcc
def test_tail_off_by_one(cuda: str) -> None:
    x, out = np.arange(333, dtype=np.float32), np.zeros(400, np.float32)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        args = [gpu.buffer(x, "x"), gpu.buffer(out[:333], "out"), 333]
        report = gpu.launch(name, 1, 128, args, check=check)
        np.testing.assert_array_equal(out[:333], 2 * x)
        return report

    report = both(cuda, "tail", run)
    assert report.kinds() == {Kind.OUT_OF_BOUNDS}
    assert {fault.thread for fault in report.faults} == {(333 % 128, 0, 0)}
    assert "byte 1332 of x, which has 1332" in str(report.faults[0])
    assert out[333] == 0


@needs_nvcc
def test_wrong_stride_touches_the_gaps(cuda: str) -> None:
    memory = np.ones((5, 48), np.float32)
    rows, out = memory[:, :32], np.zeros(5, np.float32)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        args = [gpu.buffer(rows), gpu.buffer(out), 32, 48]
        return gpu.launch(name, 5, 32, args, check=check)

    report = both(cuda, "strided", run)
    assert report.kinds() == {Kind.OUT_OF_BOUNDS}
    assert report.faults[0].cta == (1, 0, 0)


@needs_nvcc
def test_offset_that_overflows_32_bits(cuda: str) -> None:
    hidden = 4096
    row = (1 << 31) // hidden + 5
    piece, out = np.arange(hidden, dtype=np.uint16), np.zeros(128, np.uint16)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        x = gpu.sparse(2 * hidden * (row + 1), {2 * hidden * row: piece}, "x")
        report = gpu.launch(name, 1, 128, [x, gpu.buffer(out), row, hidden], check=check)
        assert report.load_counts(x).sum() == (256 if check else 0)
        return report

    report = both(cuda, "huge_row", run)
    assert report.kinds() == {Kind.OUT_OF_BOUNDS}
    assert "of x" in report.faults[0].message


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("shared_bounds", Kind.OUT_OF_BOUNDS),
        ("unwritten_shared", Kind.UNINITIALISED),
        ("warp_exchange", Kind.SHARED_RACE),
    ],
)
def test_shared_memory(cuda: str, name: str, kind: Kind) -> None:
    out = np.zeros(128, np.float32)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        return gpu.launch(name, 1, 128, [gpu.buffer(out)], check=check)

    assert both(cuda, name, run).kinds() == {kind}


@needs_nvcc
def test_threads_that_exit_before_a_barrier(cuda: str) -> None:
    out = np.zeros(128, np.float32)

    def run(gpu: Gpu, name: str, check: bool) -> Report:
        return gpu.launch(name, 2, 128, [gpu.buffer(out, conflicts=False), 100], check=check)

    report = both(cuda, "early_return", run)
    assert report.kinds() == {Kind.DIVERGENT_BARRIER}
    assert "100 of 128" in report.faults[0].message


@needs_nvcc
def test_ctas_that_add_without_an_atomic(cuda: str) -> None:
    for name, total in (("count_ctas", 9), ("count_ctas_wrong", None)):
        out = np.zeros(1, np.uint32)
        gpu = Gpu(cuda, kernels=[name])
        report = gpu.launch(name, 9, 32, [gpu.buffer(out)], check=total is not None)
        if total is None:
            assert report.kinds() == {Kind.GLOBAL_CONFLICT}
        else:
            assert out[0] == total


def kernel(body: str) -> str:
    """A kernel `k` of two pointers `%x` and `%y` and the thread number `%i`."""
    return f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 x, .param .u64 y)
{{
    .shared .align 16 .b8 stage[1024];
    .local .align 4 .b8 stack[16];
    .reg .pred %p<4>;
    .reg .b32 %i;
    .reg .b32 %r<8>;
    .reg .b64 %x, %y, %d, %e;
    ld.param.u64 %x, [x];
    ld.param.u64 %y, [y];
    mov.u32 %i, %tid.x;
    mad.wide.u32 %d, %i, 4, %y;
    {body}
    ret;
}}
"""


SHUFFLE = """
    mov.b32 %r1, %i;
    and.b32 %r2, %i, 31;
    setp.ge.u32 %p1, %r2, 16;
    @%p1 bra DONE;
    shfl.sync.{mode}.b32 %r1, %i, {distance}, 31, {mask};
DONE:
    st.global.b32 [%d], %r1;
"""
BARRIER = """
    setp.lt.u32 %p1, %i, 32;
    @%p1 bra {target};
    bar.sync 0;
    bra.uni DONE;
OTHER:
    bar.sync 0;
DONE:
    st.global.b32 [%d], %i;
"""
BARRIER_IN_A_BRANCH = """
    setp.lt.u32 %p1, %i, {limit};
    @%p1 bra WAIT;
    bra.uni DONE;
WAIT:
    bar.sync 0;
DONE:
    st.global.b32 [%d], %i;
"""
VECTOR = """
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%x+{offset}];
    add.u32 %r1, %r1, %r4;
    st.global.b32 [%d], %r1;
"""
TWO_WRITERS = """
    and.b32 %r1, %i, {mask};
    mad.wide.u32 %d, %r1, 4, %y;
    setp.lt.u32 %p1, %i, 64;
    @%p1 st.global.b32 [%d], %i;
"""
READ_OTHERS = """
    st.global.b32 [%d], %i;
    {barrier}
    xor.b32 %r1, %i, {other};
    mad.wide.u32 %e, %r1, 4, %y;
    ld.global.b32 %r2, [%e];
    mad.wide.u32 %e, %i, 4, %x;
    st.global.b32 [%e], %r2;
"""
ASYNC = """
    mov.u32 %r1, stage;
    mad.lo.u32 %r1, %i, 4, %r1;
    mad.wide.u32 %e, %i, 4, %x;
    cp.async.ca.shared.global [%r1], [%e], 4, 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+512], [%e], 4, 2;
    cp.async.commit_group;
    cp.async.wait_group {left};
    ld.shared.b32 %r2, [%r1];
    ld.shared.b32 %r3, [%r1+{second}];
    add.u32 %r2, %r2, %r3;
    st.global.b32 [%d], %r2;
"""
LOCAL = """
    mov.u32 %r1, stack;
    st.local.b32 [%r1+{offset}], %i;
    ld.local.b32 %r2, [%r1+12];
    st.global.b32 [%d], %r2;
"""
GENERIC = """
    mov.u64 %e, stage;
    cvta.shared.u64 %e, %e;
    mad.wide.u32 %e, %i, {step}, %e;
    st.b32 [%e], %i;
    ld.b32 %r1, [%e];
    st.b32 [%d], %r1;
"""
CASES = {
    "shuffle from exited lanes": (
        SHUFFLE.format(mode="down", distance=16, mask="-1"),
        SHUFFLE.format(mode="down", distance=16, mask="0xFFFF"),
        SHUFFLE.format(mode="bfly", distance=8, mask="0xFFFF"),
        Kind.INACTIVE_LANE,
    ),
    "barriers on two paths": (
        BARRIER.format(target="OTHER"),
        BARRIER.format(target="DONE"),
        BARRIER.format(target="DONE").replace("@%p1 bra DONE;", ""),
        Kind.DIVERGENT_BARRIER,
    ),
    "barrier in a branch": (
        BARRIER_IN_A_BRANCH.format(limit=16),
        BARRIER_IN_A_BRANCH.format(limit=64),
        BARRIER_IN_A_BRANCH.format(limit=128),
        Kind.DIVERGENT_BARRIER,
    ),
    "misaligned vector": (
        VECTOR.format(offset=8),
        VECTOR.format(offset=4),
        VECTOR.format(offset=16),
        Kind.MISALIGNED,
    ),
    "two writers": (
        TWO_WRITERS.format(mask=31),
        TWO_WRITERS.format(mask=62),
        TWO_WRITERS.format(mask=63),
        Kind.GLOBAL_CONFLICT,
    ),
    "reading another thread's store": (
        READ_OTHERS.format(barrier="", other=1),
        READ_OTHERS.format(barrier="bar.warp.sync -1;", other=32),
        READ_OTHERS.format(barrier="bar.sync 0;", other=33),
        Kind.GLOBAL_CONFLICT,
    ),
    "read before the copy is done": (
        ASYNC.format(left=2, second=0),
        ASYNC.format(left=1, second=512),
        ASYNC.format(left=1, second=0),
        Kind.ASYNC_READ,
    ),
    "generic address past the end": (
        GENERIC.format(step=9)
        .replace("st.b32 [%e], %i", "st.b8 [%e], %i")
        .replace("ld.b32 %r1", "ld.u8 %r1"),
        GENERIC.format(step=16),
        GENERIC.format(step=8),
        Kind.OUT_OF_BOUNDS,
    ),
    "local memory": (
        LOCAL.format(offset=16),
        LOCAL.format(offset=-16),
        LOCAL.format(offset=12),
        Kind.OUT_OF_BOUNDS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_ptx(name: str) -> None:
    *wrong, right, kind = CASES[name]
    for body in (*wrong, right):
        gpu = Gpu(kernel(body))
        x, y = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
        args = [gpu.buffer(x, "x"), gpu.buffer(y, "y")]
        if body is right:
            gpu.launch("k", 1, 128, args)
            continue
        report = gpu.launch("k", 1, 128, args, check=False)
        assert kind in report.kinds(), body
        assert report.kinds() <= {kind, Kind.UNINITIALISED}, report.faults


def test_uninitialised_global_memory() -> None:
    gpu = Gpu(kernel("ld.global.b32 %r1, [%d];\nst.global.b32 [%x], %r1;"))
    x, y = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
    args = [gpu.buffer(x, conflicts=False), gpu.buffer(y, "y", initialised=False)]
    report = gpu.launch("k", 1, 128, args, check=False)
    assert report.kinds() == {Kind.UNINITIALISED}
    assert report.faults[0].count == 128
    # What one launch writes, the next may read.
    writer = kernel("st.global.b32 [%d], %i;").replace("entry k", "entry fill")
    both_kernels = Gpu(writer + kernel("ld.global.b32 %r1, [%d];\nst.global.b32 [%x], %r1;"))
    args = [
        both_kernels.buffer(x, conflicts=False),
        both_kernels.buffer(y, "y", initialised=False),
    ]
    both_kernels.launch("fill", 1, 128, args)
    both_kernels.launch("k", 1, 128, args)


def test_misaligned_base_and_read_only_buffers() -> None:
    gpu = Gpu(kernel(VECTOR.format(offset=0)))
    memory, y = np.zeros(64, np.uint16), np.zeros(128, np.uint32)
    out = gpu.buffer(y)
    for align in (16, 32):
        gpu.launch("k", 1, 128, [gpu.buffer(memory, align=align), out])
    for align in (2, 4, 8):
        args = [gpu.buffer(memory, align=align), out]
        assert gpu.launch("k", 1, 128, args, check=False).kinds() == {Kind.MISALIGNED}
    with pytest.raises(FaultError, match="read only"):
        gpu.launch("k", 1, 128, [gpu.buffer(memory), gpu.buffer(y, "y", read_only=True)])


def test_wild_addresses_and_relaxed_loads() -> None:
    body = kernel("{wild}\nst.b32 [%e], %i;").replace(".shared .align 16 .b8 stage[1024];", "")
    memory = np.zeros(128, np.uint32)
    for wild in ("mov.b64 %e, 16;\ncvta.shared.u64 %e, %e;", "mov.b64 %e, -8;"):
        gpu = Gpu(body.replace("{wild}", wild))
        report = gpu.launch("k", 3, 32, [None, gpu.buffer(memory)], check=False)
        assert report.kinds() == {Kind.OUT_OF_BOUNDS}
        assert report.faults[0].count == 96
    body = """
    setp.eq.u32 %p1, %i, 0;
    @%p1 ld.global.b32 %r1, [%x];
    @%p1 st.relaxed.gpu.global.b32 [%x], %i;
    ld.relaxed.gpu.global.b32 %r2, [%x];
    @{guard} st.global.b32 [%x], %i;
    """
    for guard, kinds in (("!%p1", {Kind.GLOBAL_CONFLICT}), ("%p2", set())):
        gpu = Gpu(kernel(body.replace("{guard}", guard)))
        report = gpu.launch("k", 1, 32, [gpu.buffer(memory), None], check=False)
        assert report.kinds() == kinds


def test_null_pointers_and_the_report_of_traffic() -> None:
    gpu = Gpu(kernel(VECTOR.format(offset=16)))
    x, y = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    buffer, out = gpu.buffer(x, "x"), gpu.buffer(y, "y")
    with pytest.raises(FaultError, match="out of bounds"):
        gpu.launch("k", 1, 128, [None, out])
    report = gpu.launch("k", 1, 128, [buffer, out])
    assert report.load_widths(buffer) == {128}
    assert report.loaded_bytes(buffer) == 128 * 16
    np.testing.assert_array_equal(report.load_counts(buffer)[:48], [0] * 16 + [128] * 16 + [0] * 16)
    assert report.store_widths(out) == {32}
    shifted = gpu.launch("k", 1, 128, [buffer + 32, out])
    assert np.flatnonzero(shifted.load_counts(buffer)).tolist() == list(range(48, 64))


ASYNC_SIZES = """
    mov.u32 %r1, stage;
    mad.lo.u32 %r1, %i, {width}, %r1;
    mad.wide.u32 %e, %i, {width}, %x;
    setp.ge.u32 %p1, %i, 4;
    mov.u32 %r2, {size};
    @%p1 mov.u32 %r2, 0;
    @%p1 mov.b64 %e, 64;
    cp.async.{cache}.shared.global [%r1], [%e], {width}, %r2;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r3, [%r1+{last}];
    st.global.b32 [%d], %r3;
"""


@pytest.mark.parametrize(("width", "cache"), [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_async_copies_of_every_width(width: int, cache: str) -> None:
    """The bytes beyond the source size are zeros; of none no address counts, of some all do."""
    x, wait = np.arange(1, 65, dtype=np.uint32), "cp.async.wait_all;"
    words, last = width // 4, width - 4
    for size in (0, width - 4, width):
        y = np.full(8, 99, np.uint32)
        body = {"width": width, "cache": cache, "size": size, "last": last}
        gpu = Gpu(kernel(ASYNC_SIZES.format(**body, wait=wait)))
        buffer = gpu.buffer(x[: 4 * words if size else 3 * words], "x")
        report = gpu.launch("k", 1, 8, [buffer, gpu.buffer(y, "y")])
        wanted = x[words - 1 : 4 * words : words] if size == width else np.zeros(4)
        np.testing.assert_array_equal(y, [*wanted, 0, 0, 0, 0])  # threads 4 to 7 copy nothing
        assert report.loaded_bytes(buffer) == (4 * width if size else 0)
        if 0 < size < width:  # as compute-sanitizer has it
            short = gpu.buffer(x[: 3 * words + size // 4], "x")
            found = gpu.launch("k", 1, 8, [short, gpu.buffer(y, "y")], check=False)
            assert Kind.OUT_OF_BOUNDS in found.kinds()
        early = Gpu(kernel(ASYNC_SIZES.format(**body, wait="")))
        args = [early.buffer(x, "x"), early.buffer(y, "y")]
        assert Kind.ASYNC_READ in early.launch("k", 1, 8, args, check=False).kinds()
