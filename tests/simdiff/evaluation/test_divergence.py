"""The divergence from the dense model against its formula."""

from __future__ import annotations

import pytest
import torch

from simdiff.evaluation.divergence import LIKELIEST, Teacher


@pytest.mark.parametrize("vocabulary", [LIKELIEST + 1, 1000])
def test_formula(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = 3 * torch.randn(2, 37, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (37,), generator=generator)
    teacher = Teacher.of_logits(dense, targets)
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    whole = (p * (p / q).log()).sum(-1)
    order = p.argsort(-1, descending=True)
    first, rest = order[:, :LIKELIEST], order[:, LIKELIEST:]
    apart = [(p.gather(1, first), q.gather(1, first))]
    apart.append((p.gather(1, rest).sum(1, keepdim=True), q.gather(1, rest).sum(1, keepdim=True)))
    coarse = sum((a * (a / b).log()).sum(-1) for a, b in apart)
    found, loss = teacher.measures(other)
    wanted = torch.nn.functional.cross_entropy(other, targets, reduction="none")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), coarse, rtol=1e-4, atol=1e-5)
    if vocabulary == LIKELIEST + 1:  # the others together are one token
        torch.testing.assert_close(found.double(), whole, rtol=1e-4, atol=1e-5)
    else:
        assert bool((found < whole + 1e-5).all())
        assert float(found.mean()) > 0.7 * float(whole.mean())


def test_dense_model_has_none_and_nan_is_seen() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(5)
    teacher = Teacher.of_logits(logits, targets)
    assert float(teacher.measures(logits)[0].abs().max()) < 1e-5
    again = Teacher.unpacked(teacher.packed())
    assert torch.equal(again.likeliest, teacher.likeliest)
    assert torch.equal(again.targets, targets)
    assert torch.equal(again.measures(2 * logits), teacher.measures(2 * logits))
    logits[2, 7] = torch.nan
    assert teacher.measures(logits).isnan().tolist() == 2 * [[False, False, True, False, False]]
    few = Teacher.of_logits(logits[:, :10], targets)
    assert few.likeliest.shape == Teacher.unpacked(few.packed()).likeliest.shape == (5, 10)
