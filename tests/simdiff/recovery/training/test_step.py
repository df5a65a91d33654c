"""A step of training: its gradients, its time, its dtype, and what the teacher reads."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.training import step as training_step
from simdiff.recovery.training.data import Examples, batch_indices
from simdiff.recovery.training.example_states import ExampleStates
from simdiff.recovery.training.options import FineTuningOptions
from simdiff.recovery.training.step import Student
from simdiff.surgery.copies import sharing_copy
from support.own_text import drawn
from support.training import SMALL


@pytest.mark.parametrize(
    ("keeps", "seconds", "most", "wanted"),
    [
        (None, 100.0, 1000, 33),  # 3 s a step, the second one measured
        (None, 100.0, 30, 30),
        (None, 2.9, 30, 0),
        # 2 s a step without the teacher, which reads 8 examples a second: 2 n + n.
        (False, 99.0, 1000, 33),
        (False, 98.9, 1000, 32),
        (False, 98.9, 31, 31),
        # Of 20 examples it reads each once: 2 n + 20 / 8 from the third step on.
        (True, 98.5, 1000, 48),
        (True, 98.4, 1000, 47),
        (True, 3.0, 1000, 1),
        (True, 2.9, 1000, 0),
    ],
)
def test_steps_that_fit(
    keeps: bool | None, seconds: float, most: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    teacher = ExampleStates(lambda _: torch.empty(0), range(20), None, torch.device("cpu"))
    teacher.seconds, teacher.num_read, teacher.keeps = 7.0, 100, bool(keeps)
    student = object.__new__(Student)
    student._last = None
    student.device, student._options = torch.device("cpu"), SMALL
    student.train, student.optimizer = range(20), SimpleNamespace(zero_grad=lambda: None)
    student.teacher = None if keeps is None else teacher

    def step(number: int) -> None:
        nonlocal now
        now += (50.0, 3.0)[number]
        teacher.seconds, teacher.num_read = teacher.seconds + 1, teacher.num_read + 8

    student.gradients = step
    monkeypatch.setattr(training_step, "time", SimpleNamespace(perf_counter=lambda: now))
    assert SMALL.batch_size == 8
    assert student.steps_within(seconds, most) == wanted
    assert student.step_seconds == 3


def recomputes(model: PreTrainedModel) -> bool:
    """By the name that transformers 5 gave it in the end, or by the old one."""
    new = "is_activation_checkpointing"
    return bool(getattr(model, new if hasattr(model, new) else "is_gradient_checkpointing"))


def gradients(
    dense: PreTrainedModel, train: Examples, options: FineTuningOptions
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    pruned = sharing_copy(dense, (2, 3))
    student = Student(pruned, train, options, dense)
    assert recomputes(pruned) is options.gradient_checkpointing
    with torch.no_grad():
        for name, parameter in student.trained.parameters().items():
            if "lora_B" in name:  # else A has no gradient yet
                parameter.normal_(std=0.1)
    student.gradients(0)
    found = {name: p.grad.clone() for name, p in student.trained.parameters().items()}
    student.discard()
    assert not recomputes(pruned)
    assert not pruned.training
    return found


def test_gradient_checkpointing_and_portions_give_the_same_gradients(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    options = replace(SMALL, lora=replace(SMALL.lora, dropout=0.0))
    wanted = gradients(dense, text[0], options)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in wanted.values())
    for other in (
        replace(options, gradient_checkpointing=True),
        replace(options, micro_batch_size=1),
        replace(options, micro_batch_size=8),
    ):
        found = gradients(dense, text[0], other)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_padding_changes_nothing(dense: PreTrainedModel) -> None:
    """Examples of several lengths in a batch against each alone."""
    tokens = drawn(dense, 6, 24)
    mask = torch.arange(24) < torch.tensor([24, 9, 15, 24, 5, 20])[:, None]
    counted = mask.clone()
    counted[:, :2] = False
    padded = Examples(tokens.where(mask, 0), mask, counted, {})
    options = replace(
        SMALL, lora=replace(SMALL.lora, dropout=0.0), batch_size=6, micro_batch_size=6
    )
    wanted = gradients(dense, padded, replace(options, micro_batch_size=1))
    found = gradients(dense, padded, options)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    garbage = Examples(tokens, mask, counted, {})
    other = gradients(dense, garbage, options)
    for name, gradient in found.items():
        assert torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("weights", "device", "wanted", "fast", "found"),
    [
        ("float32", "cpu", "float32", True, "float32"),
        ("float32", "cpu", "bfloat16", False, "bfloat16"),
        ("float32", "cpu", "auto", True, "bfloat16"),
        ("float32", "cpu", "auto", False, "float32"),
        ("float32", "cuda", "auto", True, "bfloat16"),
        ("float32", "cuda", "auto", False, "float32"),
        ("bfloat16", "cpu", "auto", False, "bfloat16"),
        ("float16", "cpu", "auto", False, "bfloat16"),
    ],
)
def test_dtype_of_products(
    weights: str, device: str, wanted: str, fast: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in (
        (torch.cpu, "_is_avx512_bf16_supported"),
        (torch.cuda, "is_bf16_supported"),
        (torch.cpu, "_is_amx_tile_supported"),
    ):
        monkeypatch.setattr(owner, name, lambda: fast)
    model = SimpleNamespace(dtype=getattr(torch, weights), device=torch.device(device))
    assert training_step.compute_dtype(model, wanted) == getattr(torch, found)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    if device == "cpu" and wanted == "auto":
        assert training_step.compute_dtype(model, wanted) == torch.bfloat16
    if weights != "float32":
        with pytest.raises(SimdiffError, match=f"needs a model in float32, got torch.{weights}"):
            training_step.compute_dtype(model, "float32")


def test_the_teacher_reads_an_example_once(
    dense: PreTrainedModel, text: tuple[Examples, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    from simdiff.recovery.training import example_states as module

    student = Student(sharing_copy(dense, (2, 3)), text[0], SMALL, dense)
    assert student.teacher is not None
    for step in range(20):
        student.gradients(step)
    distinct = {int(i) for step in range(20) for i in batch_indices(64, 8, step, 0)}
    assert student.teacher.num_read == len(distinct) == 64
    monkeypatch.setattr(module, "MEMORY_BUDGET", 0)
    forgetful = Student(sharing_copy(dense, (2, 3)), text[0], SMALL, dense)
    for step in range(20):
        forgetful.gradients(step)
    assert forgetful.teacher is not None
    assert forgetful.teacher.num_read == 160
