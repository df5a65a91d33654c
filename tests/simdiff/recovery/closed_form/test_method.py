"""Closed-form recovery: what it brings back, padding, and that it is never worse."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs
from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import window_losses
from simdiff.models.partial_forward import PartialForward
from simdiff.models.structure import find_decoder_layers
from simdiff.recovery.closed_form.correction import Correction
from simdiff.recovery.closed_form.method import (
    correct,
    losses_of,
    recover,
    steps_of,
    unseen_windows,
)
from simdiff.recovery.closed_form.settings import Settings
from simdiff.recovery.methods import RecoveryOutcome
from simdiff.surgery.copies import own_parameters, sharing_copy
from support.closed_form import KEPT, larger, tokens
from support.families import tiny as tiny_family
from support.own_text import drawn
from support.plans import plan_for
from support.tiny_models import make_tiny

Batches = list[Tensor | Mapping[str, Tensor]]


def corrected(
    model: PreTrainedModel, fitted: Batches, unseen: Batches, settings: Settings | None = None
) -> tuple[PreTrainedModel, RecoveryOutcome]:
    pruned = sharing_copy(model, [i for i in range(6) if i not in KEPT])
    outcome = correct(model, pruned, KEPT, fitted, unseen, settings=settings, progress=False)
    return pruned, outcome


def test_a_damaged_projection_is_recovered_to_rounding() -> None:
    """Where a map exists that gives the dense states exactly, that map is found."""
    model = larger(make_tiny("llama"))
    for layer in (1, 4):  # the layers that go do nothing
        for module in (
            model.model.layers[layer].self_attn.o_proj,
            model.model.layers[layer].mlp.down_proj,
        ):
            module.weight.data.zero_()
    pruned = sharing_copy(model, (1, 4))
    own_parameters(pruned)
    damaged = pruned.model.layers[0].mlp.down_proj.weight
    damaged.data += torch.randn_like(damaged)
    text = drawn(model, 24, 12)
    outcome = correct(
        model,
        pruned,
        KEPT,
        [text[:20]],
        [text[20:]],
        settings=Settings(strengths=(1e-13,)),
        progress=False,
    )
    wanted = model.model.layers[0].mlp.down_proj.weight
    assert torch.allclose(pruned.model.layers[0].mlp.down_proj.weight, wanted, rtol=0, atol=1e-7)
    first, *rest = outcome.details["layers"]
    assert first["relative_error"] < 1e-12
    with torch.no_grad():
        difference = pruned(input_ids=text).logits - model(input_ids=text).logits
    assert float(difference.abs().max()) < 1e-6
    assert len(rest) == 3


def test_outputs_are_taken_where_inputs_exceed_the_memory_budget() -> None:
    model = larger(make_tiny("llama"))
    text = drawn(model, 40, 12)
    for budget, features in ((3 * 8 * 48**2, "inputs"), (3 * 8 * 48**2 - 1, "outputs")):
        settings = Settings(memory_budget=budget)
        _, outcome = corrected(model, [text[:32]], [text[32:]], settings)
        assert {fit["features"] for fit in outcome.details["layers"]} == {features}
        assert any("outputs" in note for note in outcome.notes) == (features == "outputs")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    model = larger(make_tiny("llama"))
    text = drawn(model, 90, 11)
    rows = [text[index : index + 1, : 5 + index % 7] for index in range(90)]
    padded = torch.full((90, 11), 96)  # a token like any other: only the mask tells
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        length = row.shape[1]
        place = slice(0, length) if side == "right" else slice(11 - length, 11)
        padded[index, place], mask[index, place] = row[0], 1
    batches: Batches = [
        {"input_ids": padded[part], "attention_mask": mask[part]}
        for part in (slice(0, 40), slice(40, 75), slice(75, 90))
    ]
    settings = Settings(strengths=(1e-2,))
    apart, one = corrected(model, rows[:75], rows[75:], settings)
    together, other = corrected(model, batches[:2], batches[2:], settings)
    assert one.details["corrected"] == other.details["corrected"] > 0
    for ours, theirs in zip(one.details["losses"], other.details["losses"], strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-9)
    assert_same_parameters(apart, together)


def assert_same_parameters(one: PreTrainedModel, other: PreTrainedModel) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.allclose(parameter, theirs[name], rtol=1e-6, atol=1e-8), name


def test_the_same_in_every_run_and_the_dense_model_is_as_it_was() -> None:
    model = larger(make_tiny("llama")).float()
    text = tokens(24)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forwards = [layer.forward for layer in find_decoder_layers(model).modules]
    one, first = corrected(model, [text[:20]], [text[20:]])
    two, second = corrected(model, [text[:20]], [text[20:]])
    assert first == second
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [layer.forward for layer in find_decoder_layers(model).modules] == forwards


def test_a_correction_that_would_hurt_is_not_made() -> None:
    """The unseen text is unlike the fitted one: the states come closer, the loss gets worse."""
    model = larger(make_tiny("llama"))
    text = tokens(24)
    plan = plan_for(6, (1, 4))
    pruned = sharing_copy(model, plan.removed)
    outcome = recover(model, plan, text, pruned=pruned, options={}, batch_size=8)
    losses = {entry["corrected"]: entry["nll"] for entry in outcome.details["losses"]}
    chosen = outcome.details["corrected"]
    assert losses[chosen] == min(losses.values())
    # The dense model knows nothing of random tokens: being like it is no better.
    assert min(losses, key=lambda count: losses[count]) == 0
    assert chosen == 0
    assert "the weights are those of the plain cut" in outcome.notes[0]
    plain = sharing_copy(model, plan.removed)
    assert all(a is b for a, b in zip(pruned.parameters(), plain.parameters(), strict=True))


def test_the_first_and_the_last_layer_may_be_cut() -> None:
    model = larger(make_tiny("llama"))
    text = tokens(40)
    for removed in ((0,), (5,), (0, 1, 5)):
        kept = [layer for layer in range(6) if layer not in removed]
        pruned = sharing_copy(model, removed)
        outcome = correct(model, pruned, kept, [text[:32]], [text[32:]], progress=False)
        first = outcome.details["layers"][0]
        assert first["layer"] == (kept[0] if 0 in removed else 4)
        errors = [first["relative_error"], *(part["relative_error"] for part in first["parts"])]
        assert min(errors) < 1


def test_what_cannot_be_corrected_is_refused() -> None:
    mixture = larger(tiny_family("mixtral")).float()
    text = tokens(8)
    pruned = sharing_copy(mixture, [5])  # nothing lies behind the cut
    with pytest.raises(SimdiffError, match="MixtralForCausalLM, at a cut, .* got none"):
        correct(mixture, pruned, range(5), [text[:6]], [text[6:]], progress=False)
    model = make_tiny("llama")
    with pytest.raises(SimdiffError, match="at least 2 windows of text"):
        recover(model, plan_for(6, (1,)), text[:1], pruned=model, options={}, batch_size=8)
    nothing = {"input_ids": text, "attention_mask": torch.zeros_like(text)}
    with pytest.raises(SimdiffError, match="unseen must leave some token"):
        corrected(model, [text], [nothing])
    model.model.layers[3].mlp.up_proj.weight.data[2, 2] = torch.nan
    with pytest.raises(SimdiffError, match="finite, got NaN or Inf"):
        corrected(model, [text[:6]], [text[6:]])


@pytest.mark.parametrize(
    ("num_windows", "length", "unseen"),
    [(2, 8, 1), (3, 8, 1), (16, 512, 2), (64, 512, 8), (500, 512, 8), (500, 500, 9), (3, 9000, 1)],
)
def test_an_eighth_of_the_text_is_not_fitted_or_what_4096_tokens_need(
    num_windows: int, length: int, unseen: int
) -> None:
    assert unseen_windows(torch.zeros(num_windows, length), 1 / 8) == unseen


def test_behind_a_cut_experts_stay_and_attention_is_corrected() -> None:
    mixture = larger(tiny_family("mixtral")).float()
    text = drawn(mixture, 40, 12)
    pruned, outcome = corrected(mixture, [text[:32]], [text[32:]])
    assert {fit["projection"] for fit in outcome.details["layers"]} == {None}
    assert [len(fit["parts"]) for fit in outcome.details["layers"]] == [0, 2, 2, 2]
    assert outcome.details["corrected"]
    assert "mixture of experts" in outcome.notes[0]
    changed = {
        name
        for (name, ours), theirs in zip(
            pruned.named_parameters(),
            sharing_copy(mixture, (1, 4)).parameters(),
            strict=True,
        )
        if not torch.equal(ours, theirs)
    }
    assert changed
    assert all("self_attn" in name for name in changed)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_losses_by_number_of_corrections_are_those_of_the_models(family: str, after: int) -> None:
    model = larger(tiny_family(family))
    text = drawn(model, 40, 12)
    pruned = sharing_copy(model, (1, 4))
    parts = [model_inputs(part.split(5), "test") for part in (text[:32], text[32:])]
    run = Correction(model, pruned, list(KEPT), *parts, Settings(after_cut=after))
    with torch.no_grad(), PartialForward(model) as dense, PartialForward(pruned) as student:
        assert len([*steps_of(run, dense, student)]) == run.num_steps
        run.finish(student)
        losses = losses_of(run, student)
    wanted = ([0, 2], [0, 1, 2]) if after == 0 else ([0, 1, 2, 3], [0, 1, 3, 4])
    assert (run.positions, list(losses)) == wanted  # before and behind the cuts, and all
    for count, loss in losses.items():
        run.keep(count)
        found = window_losses(pruned, text[32:], description=None)
        assert loss == pytest.approx(sum(found) / 8, rel=1e-6)
