"""What is timed computes what it says; a wrong result is reported."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import subjects
import torch
from torch._inductor import metrics as inductor

from simdiff_kernels.testing import exact_metrics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def subjects_on_cpu() -> list[subjects.Subject]:
    return [
        subjects.ours("cpu"),
        subjects.row_sums("cpu"),
        *subjects.in_pytorch("cpu"),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_subject_computes_what_it_says(dtype: torch.dtype) -> None:
    before, after = subjects.states(40, 96, dtype, "cpu")
    for subject in subjects_on_cpu():
        assert subjects.check(subject, before, after) is None


def altered(value: object, factor: float, index: int) -> object:
    """The result of a subject with one of its sums, of the metric `index`, times a factor."""
    if isinstance(value, torch.Tensor):  # four sums of a token
        factors = torch.ones(4)
        factors[index] = factor
        return value * factors
    assert isinstance(value, tuple)
    return tuple(v * factor if i == index else v for i, v in enumerate(value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_results_are_reported(dtype: torch.dtype) -> None:
    """Everything is off by 1% or nothing; a cosine in the states' dtype only where that tells it.

    Of a cosine near 1, seven roundings are 7 * 2^-8 in bfloat16 at most, half of the distance of
    0.05, 7 * 2^-11 in float16 and nothing to speak of in float32.
    """
    before, after = subjects.states(40, 96, dtype, "cpu")
    for subject in subjects_on_cpu()[1:]:
        sums = subject.run(before, after)
        count = 1 if isinstance(sums, tuple) and len(sums) == 1 else 3
        told = 0.01
        if subject.name == "block influence":
            told = {torch.float32: 0.01, torch.float16: 0.08, torch.bfloat16: 0.6}[dtype]
        for index in range(count):
            for factor in (0.0, 1 - told, 1 + told):
                wrong = altered(sums, factor, index)
                bad = replace(subject, name="bad", run=lambda x, y, wrong=wrong: wrong)
                found = subjects.check(bad, before, after)
                assert found is not None
                assert re.match("bad: (cosine_dist|squared_diff|absolute_diff)", found)


def test_compiled_subjects_are_compiled() -> None:
    """What torch.compile leaves to eager PyTorch makes no kernel of its own."""
    before, after = subjects.states(40, 96, torch.float32, "cpu")
    compiled = [s for s in subjects.in_pytorch("cpu") if s.name.startswith("torch.compile")]
    assert [s.name for s in compiled] == ["torch.compile, one pass", "torch.compile"]
    for subject in compiled:
        torch._dynamo.reset()
        inductor.reset()
        subject.run(before, after)
        assert inductor.generated_kernel_count > 0, subject.name
    for subject in subjects.in_pytorch("cpu", compile_too=False):
        inductor.reset()
        subject.run(before, after)
        assert inductor.generated_kernel_count == 0, subject.name


@pytest.mark.parametrize("token", [0, 255, 299])
def test_every_token_is_checked(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong token of 300, read in pieces of 64; what is exact may be known already."""
    monkeypatch.setattr(subjects, "_PIECE", 64 * 96)
    before, after = subjects.states(300, 96, torch.float32, "cpu")
    exact = subjects.exact_means(before, after)
    assert exact == pytest.approx(
        {
            name: value.mean().item()
            for name, value in exact_metrics(before, after)._asdict().items()
        },
        rel=1e-9,
    )
    ours = subjects.ours("cpu")

    def run(x: torch.Tensor, y: torch.Tensor) -> object:
        wrong = y.clone()
        wrong[:, token] *= 1.01
        return ours.run(x, wrong)

    bad = replace(ours, name="bad", run=run)
    assert "bad: " in str(subjects.check(bad, before, after))
    assert "bad: " in str(subjects.check(bad, before, after, exact))
    assert subjects.check(subjects.ours("cpu"), before, after, exact) is None
