"""The Triton kernels as compiled, executed without a GPU: numbers against float64, no faults."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptxcheck import Buffer, FaultError, Gpu, Kind, Report
from simdiff_kernels import METRICS, reference
from simdiff_kernels.running_states import empty_state
from simdiff_kernels.testing import SHORT_SUMS, near
from simdiff_kernels.triton.row_sums import CONFIGURATIONS, UNALIGNED, configuration

from .triton_kernels import Kernel, compile_variants

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16: bits are passed

ROWS = {"kernel": "row_sums", "masked": True, "nested": True, "aligned": True}
# A hidden size in each row of the table: several steps and a tail; of the longer ones also more
# steps than are summed before they are widened (bfloat16 with 32 lanes aside).
SIZES = {
    "bf16": (576, 1040, 32784),
    "fp16": (504, 1040, 32784),
    "fp32": (420, 4112, 16400),
    "fp64": (210, 2064, 8208),
}
ROW_VARIANTS = [
    {**ROWS, "element": element, "hidden_size": size}
    for element, sizes in SIZES.items()
    for size in sizes
]
ROW_VARIANTS += [
    {**ROWS, "element": element, "hidden_size": size, "aligned": False}
    for element, size in (("bf16", 1111), ("fp16", 333), ("fp32", 1111), ("fp64", 333))
]
PLAIN = {**ROWS, "element": "fp32", "hidden_size": 64, "masked": False, "nested": False}
FAR = [{**ROW_VARIANTS[0], "nested": nested} for nested in (True, False)]
FOLDS = [
    {"kernel": "fold", "kinds": "u8", "apart": True},
    {"kernel": "fold", "kinds": None, "apart": False},
]
STORES = [{"kernel": "token_metrics", "element": element} for element in ("fp32", "fp64")]
EVERYTHING = [*ROW_VARIANTS, PLAIN, FAR[1], *FOLDS, *STORES]


@pytest.fixture(scope="module", params=["cuda:80", "cuda:90"])
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kernel]:
    return compile_variants(request.param, EVERYTHING, tmp_path_factory.mktemp("ptx"))


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(str(variant[key]) for key in ("element", "hidden_size", "aligned"))


def states(
    shape: tuple[int, int], hidden_size: int, dtype: torch.dtype, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Tokens of every kind, most of them near-identical with a massive channel; gaps between."""
    x, y = near((*shape, hidden_size), 0.01, massive=True, dtype=torch.float64)(
        torch.Generator().manual_seed(hidden_size)
    )
    for token, kind in enumerate(("zeros", "parallel", "same", "nan", "shrunk", "masked inf")):
        at = divmod(token + 2, shape[1])  # the first two are ordinary
        if at[0] >= shape[0]:
            break
        if kind == "zeros":
            y[at] = 0
        elif kind == "parallel":
            y[at] = 1.5 * x[at]
        elif kind == "same":
            y[at] = x[at]
        elif kind == "nan":
            y[at][hidden_size - 1] = torch.nan
        elif kind == "shrunk":
            y[at] = y[at] / 8
        else:
            x[at][0] = torch.inf
    unit = 16 if aligned else 1
    padded = [
        torch.zeros(shape[0], shape[1] + gap, hidden_size + gap * unit, dtype=dtype)
        for gap in (1, 2)
    ]
    for space, values in zip(padded, (x, y), strict=True):
        space[:, : shape[1], :hidden_size] = values
    before, after = (space[:, : shape[1], :hidden_size] for space in padded)
    return before, after


def buffer_of(gpu: Gpu, tensor: Tensor, name: str, aligned: bool = True) -> Buffer:
    """What lies between the rows is out of bounds."""
    size = tensor.element_size()
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=16 if aligned else size)


def run_rows(
    kernel: Kernel,
    variant: dict[str, Any],
    before: Tensor,
    after: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Report, list[Buffer]]:
    """The sums that a launch writes, its report and the buffers of both states."""
    outer, inner, hidden_size = before.shape
    gpu = Gpu(kernel.ptx, **options)
    aligned = variant["aligned"]
    buffers = [buffer_of(gpu, t, n, aligned) for t, n in ((before, "before"), (after, "after"))]
    sums = torch.empty(outer, inner, 4, dtype=torch.float64)
    row = configuration(hidden_size, before.element_size(), aligned)
    programs = -(-outer * inner // row.rows)
    assert row == configuration(variant["hidden_size"], before.element_size(), aligned)
    arguments = {
        "p_sums": gpu.buffer(sums.numpy(), "sums", initialised=False),
        "p_before": buffers[0],
        "p_after": buffers[1],
        "p_mask": None if mask is None else gpu.buffer(mask.view(torch.uint8).numpy(), "mask"),
        **{"num_tokens": outer * inner, "inner": inner, "hidden_size": hidden_size},
        **strides(before, after),
    }
    # Two programs along the first axis: the rest is the second's.
    grid = (2, -(-programs // 2)) if programs > 1 else 1
    report = kernel.launch(gpu, grid, arguments)
    assert report.stored_bytes(arguments["p_sums"]) == 32 * outer * inner
    return sums, report, buffers


def strides(before: Tensor, after: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}_stride": tensor.stride(i)
        for name, tensor in (("before", before), ("after", after))
        for i, axis in enumerate(("outer", "inner"))
    }


def loads_of_tokens(report: Report, buffer: Buffer, states: Tensor) -> Tensor:
    """How often each byte of each token was loaded, `(outer, inner)`; a token's bytes alike."""
    counts = torch.from_numpy(report.load_counts(buffer).astype(np.int64))
    size, (outer, inner, hidden_size) = states.element_size(), states.shape
    steps = states.stride(0) * size, states.stride(1) * size, 1
    counts = counts.as_strided((outer, inner, hidden_size * size), steps)
    assert torch.equal(counts.amin(2), counts.amax(2))
    return counts[..., 0]


@pytest.mark.parametrize("variant", ROW_VARIANTS, ids=name_of)
def test_row_sums(kernels: dict[str, Kernel], variant: dict[str, Any]) -> None:
    """Zeros for padding, which is not read; float64 for tokens that need it, which are read twice.

    All others are read once, 16 bytes at a time.
    """
    aligned, dtype = variant["aligned"], DTYPES[variant["element"]]
    shape = (2, 4) if variant["hidden_size"] > 8192 else (3, 5)
    before, after = states(shape, variant["hidden_size"], dtype, aligned)
    mask = torch.ones(shape, dtype=torch.bool)
    mask.view(-1)[[1, 7]] = False
    sums, report, buffers = run_rows(kernels[json.dumps(variant)], variant, before, after, mask)
    wanted = torch.empty_like(sums)
    reference.row_sums(wanted, before, after, mask)
    short = reference.float32_is_enough(wanted) & (dtype != torch.float64)
    assert torch.equal(sums[~mask], torch.zeros(2, 4, dtype=torch.float64))
    close = {"atol": 0, "equal_nan": True}
    assert torch.allclose(sums[~short], wanted[~short], rtol=1e-13, **close)
    assert torch.allclose(sums[short], wanted[short], rtol=SHORT_SUMS, **close)
    twice = mask & ~short & (dtype != torch.float64)
    assert twice.sum() == (0 if dtype == torch.float64 else 4)
    for buffer, tensor in zip(buffers, (before, after), strict=True):
        assert torch.equal(loads_of_tokens(report, buffer, tensor), mask.long() + twice.long())
        widths = report.load_widths(buffer)
        entry = 8 * tensor.element_size()
        assert widths == ({128} if aligned else set()) | (
            {entry} if twice.any() or not aligned else set()
        )


def test_every_row_of_the_table_is_executed() -> None:
    for element, dtype in DTYPES.items():
        found = {
            configuration(v["hidden_size"], dtype.itemsize, v["aligned"])
            for v in ROW_VARIANTS
            if v["element"] == element
        }
        assert len(found) == len(CONFIGURATIONS) + 1
        assert UNALIGNED in found


def test_rows_are_the_same_in_every_run(kernels: dict[str, Kernel]) -> None:
    """One program at a time, or all together."""
    variant = ROW_VARIANTS[1]
    before, after = states((3, 5), variant["hidden_size"], DTYPES[variant["element"]], True)
    mask = torch.ones(3, 5, dtype=torch.bool)
    kernel = kernels[json.dumps(variant)]
    found = [
        run_rows(kernel, variant, before, after, mask, max_threads=count)[0]
        for count in (128, 1 << 14)
    ]
    assert torch.equal(found[0].view(torch.int64), found[1].view(torch.int64))


def doubtful() -> tuple[Tensor, Tensor]:
    """Tokens on both sides of each threshold of the test for short sums, none of them on it."""
    x, noise = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x / x.norm()
    noise = noise - (noise @ x) * x
    noise = noise / noise.norm()
    pairs = []
    for share in (0.45, 0.465, 0.468, 0.4695, 0.4725, 0.49):  # of d^2 in (b - a)^2, half of 15/16
        along = 1e-3 * share**0.5
        pairs.append((x, (1 + along) * x + (1e-6 - along**2) ** 0.5 * noise))
    for length in (0.2, 0.249, 0.251, 0.3):  # of y beside x
        pairs.append((x, length * noise))
    longer, shorter = x, 0.95 * x + 0.2 * noise  # squared 1 and 0.94, the difference 0.04
    for square in (0.95e30, 1.05e30):
        pairs += [
            (square**0.5 * longer, square**0.5 * shorter),
            (square**0.5 * shorter, square**0.5 * longer),
        ]
    for square in (0.45e30, 0.55e30):  # of x and y, of d twice as much
        pairs.append((square**0.5 * x, square**0.5 * noise))
    for square in (0.9e-24, 1.1e-24):  # of x and y, then of d
        pairs.append((square**0.5 * x, square**0.5 * noise))
        pairs.append((1e-11 * x, 1e-11 * x + square**0.5 * noise))
    pairs.append((x, x))
    before, after = (torch.stack(part).float()[None] for part in zip(*pairs, strict=True))
    return before, after


def test_which_tokens_are_summed_again(kernels: dict[str, Kernel]) -> None:
    before, after = doubtful()
    wanted = torch.empty(1, before.shape[1], 4, dtype=torch.float64)
    reference.row_sums(wanted, before, after)
    enough = reference.float32_is_enough(wanted)
    assert 8 <= enough.sum() <= enough.numel() - 8
    sums, report, buffers = run_rows(kernels[json.dumps(PLAIN)], PLAIN, before, after)
    for buffer, tensor in zip(buffers, (before, after), strict=True):
        assert torch.equal(loads_of_tokens(report, buffer, tensor), 2 - enough.long())
    # y^2 is x^2 + 2 x.d + d^2: where y is short, the errors of all three against what is left.
    x_squared, y_squared, squared, _ = wanted.unbind(-1)
    limit = torch.full_like(wanted, SHORT_SUMS)
    limit[..., 1] *= ((x_squared + squared) / y_squared).clamp(min=1)
    assert bool(((sums - wanted).abs() <= limit * wanted).all())
    assert torch.allclose(sums[~enough], wanted[~enough], rtol=1e-14, atol=0)


@pytest.mark.parametrize("variant", FAR, ids=("nested", "even"))
def test_rows_beyond_two_billion(kernels: dict[str, Kernel], variant: dict[str, Any]) -> None:
    """The last program of very many tokens, of elements much farther; nothing else exists."""
    hidden_size, count = variant["hidden_size"], 6
    outer, inner, outer_stride = 1, 2**31 + 6, 0
    if variant["nested"]:
        outer, inner, outer_stride = 2, 2**31 + 3, 2**41
    num_tokens = outer * inner
    first_program = (num_tokens - count) // 16
    assert first_program * 16 == num_tokens - count
    rows = [h.contiguous().bfloat16() for h in near((count, hidden_size), 0.1)(torch.Generator())]
    gpu = Gpu(kernels[json.dumps(variant)].ptx)
    arguments: dict[str, Any] = {"num_tokens": num_tokens, "inner": inner}
    arguments |= {"hidden_size": hidden_size}
    for name, tensor in zip(("before", "after"), rows, strict=True):
        start = 2 * ((outer - 1) * outer_stride + (inner - count) * hidden_size)
        piece = {start: tensor.view(torch.int16).numpy()}
        arguments[f"p_{name}"] = gpu.sparse(start + 2 * count * hidden_size, piece, name)
        arguments |= {f"{name}_outer_stride": outer_stride, f"{name}_inner_stride": hidden_size}
    ones, sums = np.ones(count, np.uint8), torch.empty(count, 4, dtype=torch.float64)
    arguments["p_mask"] = gpu.sparse(num_tokens, {num_tokens - count: ones}, "mask")
    piece = {32 * (num_tokens - count): sums.numpy()}
    arguments["p_sums"] = gpu.sparse(32 * num_tokens, piece, "sums", initialised=False)
    grid = first_program + 1
    ctas = range(first_program, grid)
    kernels[json.dumps(variant)].launch(gpu, grid, arguments, ctas=ctas)
    wanted = torch.empty(1, count, 4, dtype=torch.float64)
    reference.row_sums(wanted, rows[0][None], rows[1][None])
    assert torch.allclose(sums, wanted[0], rtol=SHORT_SUMS, atol=0)


@pytest.mark.parametrize(
    ("removed", "kind"),
    [("bar.sync", Kind.SHARED_RACE), ("cp.async.wait_group", Kind.ASYNC_READ)],
)
def test_rows_without_synchronisation(kernels: dict[str, Kernel], removed: str, kind: Kind) -> None:
    kernel = kernels[json.dumps(PLAIN)]
    lines = [line for line in kernel.ptx.splitlines() if removed not in line]
    broken = Kernel("\n".join(lines), kernel.name, kernel.threads, kernel.shared, kernel.parameters)
    rows = torch.randn(2, 1, 40, 512, generator=torch.Generator().manual_seed(2)).unbind(0)
    with pytest.raises(FaultError, match=kind.value):
        run_rows(broken, PLAIN, *rows)


def some_sums(layers: int, outer: int, inner: int) -> Tensor:
    """Row sums of tokens no two of which are alike, some of them zero vectors or not finite."""
    before, after = near((layers * outer, inner, 24), 0.1, massive=True, dtype=torch.float64)(
        torch.Generator().manual_seed(inner)
    )
    share = torch.rand(before.shape[:2], generator=torch.Generator().manual_seed(1))
    after = torch.lerp(before, after, share.double().unsqueeze(-1))
    before[0, 3], after[0, 4], before[0, 9], after[0, 9] = 0, 0, 0, 0
    before[0, 7, 5], after[-1, 2, 1], after[0, 10, 0] = torch.nan, torch.inf, torch.nan
    sums = torch.empty(layers * outer, inner, 4, dtype=torch.float64)
    reference.row_sums(sums, before, after)
    return sums.view(layers, outer, inner, 4)


def run_fold(
    kernel: Kernel,
    state: tuple[Tensor, Tensor],
    sums: Tensor,
    kinds: Tensor | None,
    places: tuple[int, int, int],
) -> tuple[Report, Buffer]:
    """Fold into a state, in place."""
    gpu = Gpu(kernel.ptx)
    arguments: dict[str, Any] = {
        "p_moments": gpu.buffer(state[0].numpy(), "moments"),
        "p_counts": gpu.buffer(state[1].numpy(), "counts"),
        "p_sums": gpu.buffer(sums.numpy(), "sums"),
        "num_tokens": sums.shape[1] * sums.shape[2],
        "hidden_size": 24,
        **dict(zip(("first_state", "offset", "tokens_per_state"), places, strict=True)),
    }
    if kinds is not None:
        arguments["p_kinds"] = gpu.buffer(kinds.numpy(), "kinds")
    report = kernel.launch(gpu, (state[0].shape[0], state[0].shape[1]), arguments)
    return report, arguments["p_sums"]


# First state, offset and tokens per state of 700 tokens: several tiles and none, states without
# tokens and tokens without state.
PLACES = [(0, 0, 700), (-1, 150, 200), (1, 40, 300), (0, 699, 100)]


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("variant", FOLDS, ids=("apart", "plain"))
def test_fold(
    kernels: dict[str, Kernel], variant: dict[str, Any], places: tuple[int, int, int]
) -> None:
    sums, apart = some_sums(2, 7, 100), variant["apart"]
    kinds = None
    if variant["kinds"]:
        kinds = torch.randint(3, (7, 100), generator=torch.Generator().manual_seed(5)).byte()
        kinds[0, :12] = torch.tensor([1, 1, 0, 1, 1, 2, 1, 1, 2, 1, 2, 0])
    found = empty_state(4, 2)
    reference.fold(*found, some_sums(2, 3, 100), 24)  # something seen before
    wanted = tuple(part.clone() for part in found)
    report, buffer = run_fold(kernels[json.dumps(variant)], found, sums, kinds, places)
    reference.fold(*wanted, sums, 24, kinds, *places, apart)
    assert torch.equal(found[1], wanted[1])
    assert torch.allclose(found[0], wanted[0], rtol=1e-13, atol=0)
    # Each state reads its own tokens, the one of tokens apart all.
    assert report.load_counts(buffer).max() <= 1 + apart


def test_of_equal_tokens_the_earliest_counts(kernels: dict[str, Kernel]) -> None:
    """In the same thread, in a later and in an earlier one, in the tile that follows."""
    sums = torch.ones(1, 1, 900, 4, dtype=torch.float64)
    first = {44: (300, 301), 5: (5 + 256, 5 + 512), 700: (600 + 256,)}
    for earliest, others in first.items():
        state = empty_state(1, 1)
        some = sums.clone()
        some[0, 0, [earliest, *others]] = torch.tensor([4.0, 9.0, 2.0, 3.0], dtype=torch.float64)
        wanted = tuple(part.clone() for part in state)
        for _ in range(2):  # a maximum that comes again stays where it was
            run_fold(kernels[json.dumps(FOLDS[1])], state, some, None, (0, 0, 900))
            reference.fold(*wanted, some, 24)
        assert torch.equal(state[1], wanted[1])
        assert (state[1][0, 0, [1, 2, 4, 5]] == earliest).all()


def test_fold_beyond_two_billion_tokens(kernels: dict[str, Kernel]) -> None:
    """The second state begins with token 2^31 of the second layer."""
    first, count = 2**31, 5
    num_tokens = first + count
    tokens = some_sums(1, 1, 20)[:, :, 11 : 11 + count].contiguous()
    gpu = Gpu(kernels[json.dumps(FOLDS[1])].ptx)
    state, wanted = empty_state(2, 2), empty_state(1, 1)
    reference.fold(*wanted, tokens, 24)
    arguments: dict[str, Any] = {
        "p_moments": gpu.buffer(state[0].numpy(), "moments"),
        "p_counts": gpu.buffer(state[1].numpy(), "counts"),
        "p_sums": gpu.sparse(64 * num_tokens, {32 * (num_tokens + first): tokens.numpy()}, "sums"),
        **{"num_tokens": num_tokens, "hidden_size": 24, "first_state": 0, "offset": 0},
        "tokens_per_state": first,
    }
    # Programs count along the states first: the last is state 1 of layer 1.
    kernels[json.dumps(FOLDS[1])].launch(gpu, (2, 2), arguments, ctas=range(3, 4))
    wanted[1][..., : len(METRICS)] += first
    wanted[1][..., -1] = num_tokens
    assert torch.equal(state[1][1, 1], wanted[1][0, 0])
    assert torch.allclose(state[0][1, 1], wanted[0][0, 0], rtol=1e-13, atol=0)
    assert torch.equal(state[0][0], empty_state(1, 2)[0][0])


@pytest.mark.parametrize("variant", STORES, ids=("fp32", "fp64"))
def test_metrics_of_every_token(kernels: dict[str, Kernel], variant: dict[str, Any]) -> None:
    dtype, kernel = DTYPES[variant["element"]], kernels[json.dumps(variant)]
    sums = some_sums(2, 3, 100)
    out = torch.empty(2, len(METRICS), 3, 100, dtype=dtype)
    gpu = Gpu(kernel.ptx)
    buffers = {"p_per_token": gpu.buffer(out.numpy(), "out", initialised=False)}
    buffers["p_sums"] = gpu.buffer(sums.numpy(), "sums")
    report = kernel.launch(gpu, (2, 2), {**buffers, "num_tokens": 300, "hidden_size": 24})
    wanted = reference.metrics_of_sums(sums, 24).transpose(0, 1)
    limit = 1e-13 if dtype == torch.float64 else 2.0**-24
    assert torch.allclose(out.double(), wanted, rtol=limit, atol=0, equal_nan=True)
    assert report.load_counts(buffers["p_sums"]).max() == 1
