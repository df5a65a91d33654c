"""Loss and gradient by chunks of tokens, against autograd on all logits at once, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, Gemma2Config

from simdiff.errors import SimdiffError
from simdiff.models.structure import decoder_body
from simdiff.recovery.training import head_loss as module
from simdiff.recovery.training.head_loss import Distillation, Head, head_loss, linear_head
from support.tiny_models import make_tiny

HIDDEN, VOCABULARY = 24, 211


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, labels and the dense model's states."""
    generator = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (num_tokens,), generator=generator)
    wanted = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return states.requires_grad_(), labels, wanted


def head(seed: int, bias: bool = True) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    return Head(weight, torch.randn(VOCABULARY, generator=generator).double() if bias else None)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(
    ("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 1.0), (1.0, 2.0), (0.7, 0.5)]
)
def test_equals_autograd_on_all_logits(num_tokens: int, weight: float, temperature: float) -> None:
    states, labels, wanted = inputs(num_tokens)
    own, other = head(1), head(2, bias=False)
    found = head_loss(states, labels, own, wanted, other, Distillation(weight, temperature))
    (slope,) = torch.autograd.grad(2.5 * found.loss, states)
    logits = states @ own.weight.T + own.bias
    entropy = cross_entropy(logits, labels, reduction="sum")
    divergence = kl_div(
        (logits / temperature).log_softmax(1),
        (wanted @ other.weight.T / temperature).log_softmax(1),
        reduction="sum",
        log_target=True,
    )
    loss = (1 - weight) * entropy + weight * temperature**2 * divergence
    (exact,) = torch.autograd.grad(2.5 * loss, states)
    assert found.cross_entropy == pytest.approx(float(entropy), rel=1e-12)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-12)
    assert torch.allclose(slope, exact, rtol=1e-10, atol=1e-12)


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    states, labels, _ = inputs(70)
    found = head_loss(states, labels, head(1), distillation=Distillation())
    assert float(found.loss) == found.cross_entropy


def test_logits_of_few_tokens_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = Head.logits

    def counting(self: Head, hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", counting)
    states, labels, wanted = inputs(200)
    head_loss(states, labels, head(1), wanted, head(2), Distillation()).loss.backward()
    assert max(seen) <= module.ROWS["cpu"]
    assert sum(seen) == 2 * 200, "each once for either model"


def test_logits_themselves_without_a_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, VOCABULARY, generator=generator).double().requires_grad_()
    labels = torch.arange(70)
    found = head_loss(logits, labels, Head())
    (slope,) = torch.autograd.grad(found.loss, logits)
    (exact,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)
    assert torch.allclose(slope, exact, rtol=1e-10, atol=1e-12)


def test_heads_that_do_more_are_found(family: str) -> None:
    model = make_tiny(family)
    plain = linear_head(model, torch.float32)
    assert plain is not None
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        states = decoder_body(model)(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(plain.logits(states), model(input_ids=ids).logits)
    capped = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            head_dim=8,
            final_logit_softcapping=0.5,
        )
    ).eval()
    assert linear_head(capped, torch.float32) is None


@pytest.mark.parametrize("wrong", [{"weight": 1.1}, {"weight": -0.1}, {"temperature": 0.0}])
def test_distillation_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(SimdiffError, match="distillation: .* must be"):
        Distillation(**wrong).check()
