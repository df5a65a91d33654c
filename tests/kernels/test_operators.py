"""The registered operators: opcheck, torch.compile, registration without the compiled module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from simdiff_kernels import METRICS, RunningScores, _ops, token_metrics
from simdiff_kernels.backends import num_parts
from simdiff_kernels.running_states import empty_state as empty_states

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def empty_state(backend: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of one layer that has seen nothing."""
    moments, counts = empty_states(1, num_parts(backend), device)
    return moments[0], counts[0]


def arguments(
    operator: str, dtype: torch.dtype, backend: str, device: str, full: bool
) -> tuple[object, ...]:
    before, after = (torch.randn(2, 3, 40).to(dtype).to(device) for _ in range(2))
    mask = torch.tensor([[True, True, False]] * 2, device=device) if full else None
    sums = torch.empty(2, 3, 4, dtype=torch.float64, device=device)
    if operator == "token_metrics":
        return before, after
    if operator == "row_sums":
        return sums, before, after, mask
    if operator == "fold":
        kinds = None if mask is None else mask.view(torch.uint8)
        out = torch.empty(1, len(METRICS), 2, 3, device=device) if full else None
        sums = sums.copy_(torch.rand(2, 3, 4))[None]
        return *empty_states(3, 1, device), sums, 40, kinds, 0, 1, 4, full, out
    out = torch.empty(len(METRICS), 2, 3, device=device) if full else None
    return *empty_state(backend, device), before, after, mask, out


@pytest.mark.parametrize("operator", ["row_sums", "fold", "token_metrics", "accumulate"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "mask-and-tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(operator: str, full: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    overload = getattr(getattr(_ops.ops, operator), backend)
    inputs = arguments(operator, dtype, backend, device, full)
    results = torch.library.opcheck(overload, inputs, test_utils=CHECKS)
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_token_metrics_equal_eager(backend: str, device: str) -> None:
    compiled = torch.compile(token_metrics, fullgraph=True)
    for shape in ((3, 5, 64), (4, 5, 64), (7, 96)):
        before, after = torch.randn(shape, device=device), torch.randn(shape, device=device)
        for got, wanted in zip(
            compiled(before, after, backend=backend),
            token_metrics(before, after, backend=backend),
            strict=True,
        ):
            assert torch.equal(got, wanted)


def test_compiled_accumulation_equals_eager(backend: str, device: str) -> None:
    def double_and_score(moments, counts, before, mask):
        after = before * 2
        operator = getattr(_ops.ops.accumulate, backend)
        operator(moments, counts, before, after, mask, None)
        return after

    states = [empty_state(backend, device) for _ in range(2)]
    before = torch.randn(2, 9, 40, device=device)
    mask = torch.rand(2, 9, device=device) > 0.4
    double_and_score(*states[0], before, mask)
    torch.compile(double_and_score, fullgraph=True)(*states[1], before, mask)
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_compiled_update_equals_eager() -> None:
    eager, compiled = RunningScores(1), RunningScores(1)
    update = torch.compile(compiled.update, fullgraph=True)
    for seed in range(3):
        before, after = torch.randn(2, 6, 32).unbind(0) if seed == 2 else torch.randn(2, 4, 6, 32)
        eager.update(0, before, after)
        update(0, before, after)
    assert torch.equal(eager.state_dict()["moments"], compiled.state_dict()["moments"])


def test_operators_tolerate_no_tokens(backend: str, device: str) -> None:
    empty = torch.empty(2, 0, 16, device=device)
    operators = _ops.ops
    result = getattr(operators.token_metrics, backend)(empty, empty)
    assert result.shape == (len(METRICS), 2, 0)
    moments, counts = empty_state(backend, device)
    getattr(operators.accumulate, backend)(moments, counts, empty, empty, None, None)
    assert torch.equal(counts.cpu(), empty_state(backend, "cpu")[1])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True
    )


def test_without_the_compiled_module_the_reference_serves() -> None:
    code = """
import sys
sys.modules["simdiff_kernels._C"] = None  # what an ImportError looks like
import torch, simdiff_kernels as sk
x = torch.randn(4, 8)
assert sk.default_backend("cpu") == "reference"
assert torch.equal(sk.token_metrics(x, x).cosine_distance, torch.zeros(4))
try:
    sk.token_metrics(x, x, backend="cpu")
except ValueError as error:
    print(error)
"""
    result = run_python(code)
    assert "is not built" in result.stdout, result.stderr


def test_importing_needs_neither_transformers_nor_cuda_nor_triton() -> None:
    code = """
import sys
for name in ("transformers", "triton", "numpy"):
    sys.modules[name] = None
import torch, simdiff_kernels as sk
scores = sk.RunningScores(1)
scores.update(0, torch.ones(2, 4), torch.ones(2, 4))
scores.finish()
assert not torch.cuda.is_initialized()
print("imported")
"""
    result = run_python(code)
    assert result.stdout == "imported\n", result.stderr


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "neon"])
def test_instruction_set_is_chosen_by_environment(name: str) -> None:
    import simdiff_kernels._C as extension

    if name not in extension.available_instruction_sets():
        pytest.skip(f"this processor does not run {name}")
    code = (
        "import simdiff_kernels.ops, simdiff_kernels._C as c; print(c.selected_instruction_set())"
    )
    assert run_python(code, SIMDIFF_CPU_ISA=name).stdout.strip() == name


def test_unknown_instruction_set_is_refused() -> None:
    result = run_python("import simdiff_kernels.ops", SIMDIFF_CPU_ISA="sse9")
    assert "SIMDIFF_CPU_ISA: instruction set must be one of baseline" in result.stderr
    assert "got 'sse9'" in result.stderr
