"""The Triton kernels as compiled, executed without a GPU: numbers against float64, no faults."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx import Buffer, Gpu
from simdiff_kernels import METRICS, TokenMetrics, reference
from simdiff_kernels.metrics import result_dtype
from simdiff_kernels.running import _empty_state as empty_states
from simdiff_kernels.testing import check_metrics, near
from simdiff_kernels.triton.compile import ELEMENT_TYPES, variants
from simdiff_kernels.triton.configurations import CONFIGURATIONS, configuration
from simdiff_kernels.triton.partials import PARTIAL_BLOCK, SCRATCH_WORDS

from .triton_kernels import Kernel, compile_variants

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
OUTER, INNER = 3, 5
TOKENS = OUTER * INNER
KEEP = "accumulate_masked_keep_tokens"


def some_variants() -> list[dict[str, Any]]:
    """Every configuration for every element type, aligned and not, with both operators."""
    # The one kernel that does everything stands for both operators on unaligned rows.
    aligned = [v for v in variants(("token_metrics", "accumulate_masked")) if v["aligned"]]
    unaligned = [v for v in variants((KEEP,)) if not v["aligned"]]
    unmasked = [v for v in variants(("accumulate",)) if v["aligned"] and v["hidden_size"] == 1]
    keep = {"hidden_size": 4097, "element": "fp32", "aligned": True, "use": KEEP}
    return [*aligned, *unaligned, *unmasked, keep]


VARIANTS = some_variants()
FAR = [
    {"hidden_size": 576, "element": "bf16", "aligned": True, "use": KEEP, "wide": wide}
    for wide in (False, True)
]
ONES = {"hidden_size": 1, "element": "fp16", "aligned": False, "use": KEEP, "ones": True}
JOINS = [{"use": "join", "wide": wide} for wide in (False, True)]


@pytest.fixture(scope="module", params=["cuda:80", "cuda:90"])
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kernel]:
    everything = [*VARIANTS, *FAR, ONES, *JOINS]
    return compile_variants(request.param, everything, tmp_path_factory.mktemp("ptx"))


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(str(value) for value in variant.values())


def hidden_size_of(variant: dict[str, Any]) -> int:
    """Several steps and a tail, small, in the variant's row of the table."""
    aligned = variant["aligned"]
    if variant["hidden_size"] == 1:
        return 576 if aligned else 333
    return variant["hidden_size"] + (15 if aligned else 2)  # first of a row: 2^n + 1


def empty_state() -> tuple[Tensor, Tensor]:
    moments, tallies = empty_states(torch.device("cpu"), 1)
    return moments[0], tallies[0]


def states(hidden_size: int, aligned: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states with a massive channel, of every kind, and gaps between rows and sequences."""
    generator = torch.Generator().manual_seed(hidden_size)
    build = near((TOKENS, hidden_size), 0.01, massive=True, dtype=torch.float64)
    first, second = build(generator)
    share = torch.rand(TOKENS, 1, generator=generator, dtype=torch.float64)  # no two alike
    x, y = first, torch.lerp(first, second, share)
    x[1], y[2], x[3], y[3] = 0, 0, 0, 0
    x[6] = y[6]
    # The maxima stand twice, norm_before's in another program too; token 14 is to be masked.
    x[10], y[10] = 4 * x[10], -6 * y[10]
    x[12], y[12] = x[10], y[10]
    x[5], y[5] = x[10], torch.lerp(x[10], 4 * second[10], 1e-3)  # nearly identical
    x[14], y[14] = 8 * x[14], -8 * y[14]
    unit = 16 if aligned else 1
    padded = [
        torch.zeros(OUTER, INNER + gap, hidden_size + gap * unit, dtype=dtype) for gap in (1, 2)
    ]
    for space, values in zip(padded, (x, y), strict=True):
        space[:, :INNER, :hidden_size] = values.view(OUTER, INNER, hidden_size)
    before, after = (space[:, :INNER, :hidden_size] for space in padded)
    return before, after


def some_mask() -> Tensor:
    """Leaves out the largest token, two others, and one that is not finite."""
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[[0, 8, 13, 14]] = False
    return mask.view(OUTER, INNER)


def make_nonfinite(before: Tensor, after: Tensor) -> list[int]:
    """Two tokens that count and one that does not."""
    before[0, 4, 5], after[1, 2, 2], after[2, 3, 7] = torch.nan, torch.inf, torch.nan
    return [4, 7, 13]


def buffer_of(gpu: Gpu, tensor: Tensor, name: str, aligned: bool) -> Buffer:
    """What lies between the rows is out of bounds; NumPy has no bfloat16, so bits are passed."""
    size = tensor.element_size()
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=256 if aligned else size)


def strides(before: Tensor, after: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}_stride": tensor.stride(i)
        for name, tensor in (("before", before), ("after", after))
        for i, axis in enumerate(("outer", "inner"))
    }


def check_loads(report: Any, buffer: Buffer, nbytes: int, aligned: bool) -> None:
    counts = report.load_counts(buffer)
    assert counts.max() == 1, "a byte was loaded twice"
    assert counts.sum() == nbytes
    if aligned:
        assert report.load_widths(buffer) == {128}


def check_join(
    kernel: Kernel, scratch: np.ndarray, programs: int, tokens: int, state: tuple[Tensor, Tensor]
) -> None:
    """Join the columns that the programs wrote; any other is out of bounds."""
    gpu = Gpu(kernel.ptx)
    buffers = [gpu.buffer(part.numpy(), name) for part, name in zip(state, "mt", strict=True)]
    columns = gpu.buffer(scratch[:, :programs], "scratch")
    report = kernel.launch(gpu, 1, [*buffers, columns, programs, tokens])
    assert report.load_counts(columns).max() == 1


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_kernel(kernels: dict[str, Kernel], variant: dict[str, Any]) -> None:
    kernel, use, aligned = kernels[json.dumps(variant)], variant["use"], variant["aligned"]
    hidden_size, dtype = hidden_size_of(variant), DTYPES[variant["element"]]
    before, after = states(hidden_size, aligned, dtype)
    nonfinite = make_nonfinite(before, after) if use != "token_metrics" else []
    row = configuration(hidden_size, before.element_size(), aligned)
    assert row == configuration(variant["hidden_size"], before.element_size(), aligned)
    tiles = -(-TOKENS // row.tokens)
    tiles_per_program = 1 if use == "token_metrics" else 2
    programs = -(-tiles // tiles_per_program)

    gpu = Gpu(kernel.ptx)
    x, y = (buffer_of(gpu, t, n, aligned) for t, n in ((before, "before"), (after, "after")))
    out = torch.full((len(METRICS), OUTER, INNER), torch.nan, dtype=result_dtype(dtype))
    scratch = np.full((SCRATCH_WORDS // PARTIAL_BLOCK, PARTIAL_BLOCK), -1, np.int64)
    mask = some_mask() if "masked" in use else None
    arguments: dict[str, Any] = {"before": x, "after": y, **strides(before, after)}
    arguments |= {"num_tokens": TOKENS, "inner": INNER, "hidden_size": hidden_size}
    arguments |= {"tiles_per_program": tiles_per_program}
    if mask is not None:
        arguments["mask"] = gpu.buffer(mask.view(torch.uint8).numpy(), "mask")
    if use in ("token_metrics", KEEP):
        arguments["per_token"] = gpu.buffer(out.numpy(), "out", initialised=False)
    if use != "token_metrics":
        arguments["scratch"] = gpu.buffer(scratch, "scratch", initialised=False)
    report = kernel.launch_main(gpu, programs, arguments)

    read = TOKENS if mask is None or use == KEEP else int(mask.sum())
    for buffer in (x, y):
        check_loads(report, buffer, read * hidden_size * before.element_size(), aligned)
    if "per_token" in arguments:
        rows = [token for token in range(TOKENS) if token not in nonfinite]
        flat = out.flatten(1)
        check_metrics(
            TokenMetrics(*flat[:, rows].unbind(0)),
            before.flatten(0, 1)[rows],
            after.flatten(0, 1)[rows],
        )
        assert not flat[0, nonfinite].isfinite().any()
    if "scratch" in arguments:
        moments, tallies = empty_state()
        # An earlier batch, of which only norm_after's maximum stays.
        reference.accumulate(moments, tallies, 0.3 * before.double(), before.double())
        wanted = moments.clone(), tallies.clone()
        reference.accumulate(*wanted, before, after, mask)
        check_join(kernels[json.dumps(JOINS[0])], scratch, programs, TOKENS, (moments, tallies))
        assert torch.equal(tallies, wanted[1])
        assert torch.allclose(moments, wanted[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("variant", FAR, ids=name_of)
def test_tokens_and_elements_beyond_two_billion(
    kernels: dict[str, Kernel], variant: dict[str, Any]
) -> None:
    """The last two tiles of very many tokens; of all other tokens nothing exists."""
    kernel, wide = kernels[json.dumps(variant)], variant["wide"]
    hidden_size = variant["hidden_size"]
    # Narrow: one sequence, its length and strides just below 2^31, where int32 still does.
    outer, inner, outer_stride = (2, 2**31 + 3, 2**41) if wide else (1, 2**31 - 2, 2**31 - 16)
    num_tokens, count = outer * inner, 6  # the last tile is not full
    rows = [(tensor.flatten(0, 1)[4 : 4 + count]).contiguous() for tensor in aligned_states()]
    first_token, first_block = num_tokens - count, (num_tokens - count) // 4
    assert first_token % 4 == 0
    gpu = Gpu(kernel.ptx)
    arguments: dict[str, Any] = {"num_tokens": num_tokens, "inner": inner, "tiles_per_program": 1}
    arguments |= {"hidden_size": hidden_size}
    for name, tensor in zip(("before", "after"), rows, strict=True):
        start = 2 * ((outer - 1) * outer_stride + (inner - count) * hidden_size)
        piece = {start: tensor.view(torch.int16).numpy()}
        arguments[name] = gpu.sparse(start + 2 * count * hidden_size, piece, name)
        arguments |= {f"{name}_outer_stride": outer_stride, f"{name}_inner_stride": hidden_size}
    mask, out = np.ones(count, np.uint8), torch.empty(len(METRICS), count)
    arguments["mask"] = gpu.sparse(num_tokens, {first_token: mask}, "mask")
    values = {4 * (m * num_tokens + first_token): out[m].numpy() for m in range(len(METRICS))}
    arguments["per_token"] = gpu.sparse(4 * len(METRICS) * num_tokens, values, "out")
    words = SCRATCH_WORDS // PARTIAL_BLOCK
    scratch = np.full((words, PARTIAL_BLOCK), -1, np.int64)
    # So many programs would write beyond the scratch memory; their indices are what is tested.
    columns = {8 * (PARTIAL_BLOCK * i + first_block): scratch[i, :2] for i in range(words)}
    nbytes = 8 * (SCRATCH_WORDS + first_block)
    arguments["scratch"] = gpu.sparse(nbytes, columns, "scratch")
    blocks = range(first_block, first_block + 2)
    kernel.launch_main(gpu, blocks.stop, arguments, blocks)
    check_metrics(TokenMetrics(*out.unbind(0)), *rows)

    wanted, state = empty_state(), empty_state()
    reference.accumulate(*wanted, rows[0][None], rows[1][None])
    for _, tallies in (wanted, state):
        tallies[-1] = 2**40  # tokens seen before
    wanted[1][: len(METRICS)] += 2**40 + first_token
    wanted[1][-1] += num_tokens
    check_join(kernels[json.dumps(JOINS[wide])], scratch, 2, num_tokens, state)
    assert torch.equal(state[1], wanted[1])
    assert torch.allclose(state[0], wanted[0], rtol=1e-13, atol=0)


def aligned_states() -> tuple[Tensor, Tensor]:
    return states(576, True, torch.bfloat16)


def test_sizes_of_one_are_constants(kernels: dict[str, Kernel]) -> None:
    """One hidden entry and strides of one, which Triton compiles into the kernel."""
    kernel = kernels[json.dumps(ONES)]
    pair = torch.tensor([[3.0, 6.0], [-2.0, 2.0], [0.0, 1.0], [0.0, 0.0], [5.0, 5.0]]).half()
    before, after = pair.t().contiguous()[:, :, None]
    count, gpu = len(before), Gpu(kernel.ptx)
    out, scratch = torch.empty(len(METRICS), count), np.zeros(SCRATCH_WORDS, np.int64)
    arguments = {
        "before": buffer_of(gpu, before, "before", False),
        "after": buffer_of(gpu, after, "after", False),
        "mask": gpu.buffer(np.ones(count, np.uint8), "mask"),
        "per_token": gpu.buffer(out.numpy(), "out", initialised=False),
        "scratch": gpu.buffer(scratch, "scratch", initialised=False),
        **{"num_tokens": count, "inner": 1, "tiles_per_program": 2},
    }
    kernel.launch_main(gpu, 1, arguments)
    check_metrics(TokenMetrics(*out.unbind(0)), before, after)


def test_every_row_of_the_table_is_executed() -> None:
    for element, size in ELEMENT_TYPES.items():
        for aligned in (True, False):
            rows = {
                configuration(hidden_size_of(variant), size, aligned)
                for variant in VARIANTS
                if (variant["element"], variant["aligned"]) == (element, aligned)
            }
            tokens_and_vectors = {row[1:] for row in CONFIGURATIONS[size]}
            wanted = len(tokens_and_vectors) if aligned else len({t for t, _ in tokens_and_vectors})
            assert len(rows) == wanted
