"""The part of the vocabulary of a step: what it holds, and that it stands for the whole."""

from __future__ import annotations

import math

import torch

from simdiff.recovery.training.data import Examples, cut_windows
from simdiff.recovery.training.few_logits import FewLogits
from simdiff.recovery.training.head_loss import Distillation, Head, head_loss

VOCABULARY = 200


def text() -> Examples:
    """Tokens 0 to 19 often, 20 to 59 seldom, 60 to 199 never."""
    often, seldom = torch.arange(20).repeat(10), torch.arange(20, 60)
    return cut_windows(torch.cat([often, seldom])[None], 240, {})


def test_what_is_drawn() -> None:
    torch.manual_seed(0)
    few = FewLogits(text(), VOCABULARY, 40)
    labels = torch.tensor([3, 150, 61, 3, 45])
    drawn = few.draw(labels)
    assert torch.equal(drawn.tokens[drawn.labels], labels)
    assert len(set(drawn.tokens.tolist())) == len(drawn.tokens) == 30 + 2 + 1 + 10
    assert set(range(20)) <= set(drawn.tokens.tolist()), "what is frequent"
    assert drawn.added.tolist()[:33] == [0.0] * 33
    assert torch.allclose(drawn.added[33:], torch.tensor(math.log(167 / 10)))
    assert not torch.equal(few.draw(labels).tokens, drawn.tokens)


def test_all_of_them_are_the_whole_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, 8, generator=generator)
    head = Head(weight, torch.randn(VOCABULARY, generator=generator))
    labels = torch.tensor([3, 150, 61])
    drawn = FewLogits(text(), VOCABULARY, 4 * VOCABULARY).draw(labels)
    own, taught = torch.randn(2, 3, 8, generator=generator)
    whole = head_loss(own, labels, head, taught, head, Distillation(0.5))
    found = head_loss(own, drawn.labels, drawn.of(head), taught, drawn.of(head), Distillation(0.5))
    assert torch.allclose(found.loss, whole.loss)
    assert math.isclose(found.cross_entropy, whole.cross_entropy, rel_tol=1e-5)


def test_gradients_are_right_on_average() -> None:
    """Of the divergence from another head, over draws, against all logits."""
    torch.manual_seed(2)
    likely = 2.5 * (torch.arange(VOCABULARY) < 20)  # as in a text whose frequent tokens they are
    own, taught = (Head(torch.randn(VOCABULARY, 8), likely) for _ in range(2))
    few, labels = FewLogits(text(), VOCABULARY, 120), torch.randint(0, VOCABULARY, (30,))
    states = (0.5 * torch.randn(30, 8)).requires_grad_()

    def slope(head: Head, labels: torch.Tensor, teacher: Head) -> torch.Tensor:
        loss = head_loss(states, labels, head, states.detach(), teacher, Distillation()).loss
        return torch.autograd.grad(loss, states)[0]

    exact = slope(own, labels, taught)
    draws = [few.draw(labels) for _ in range(200)]
    mean = sum(slope(d.of(own), d.labels, d.of(taught)) for d in draws) / len(draws)
    assert float((mean - exact).norm() / exact.norm()) < 0.1
    unweighted = [Head(own.weight[d.tokens], likely[d.tokens]) for d in draws]
    other = [Head(taught.weight[d.tokens], likely[d.tokens]) for d in draws]
    plain = sum(
        slope(mine, d.labels, its) for mine, d, its in zip(unweighted, draws, other, strict=True)
    ) / len(draws)
    assert float((plain - exact).norm() / exact.norm()) > 0.2, "the test would see it"
