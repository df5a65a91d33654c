"""Closed-form recovery: the solver against lstsq, layers of many kinds, padding, never worse."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from own_text import decided, drawn
from plans import plan_for
from test_families import tiny as tiny_family
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models import find_decoder_layers
from simdiff.recovery.closed_form import correct, recover
from simdiff.recovery.copies import own_parameters, pruned_copy
from simdiff.recovery.correction import Correction, Settings
from simdiff.recovery.depths import Depths, depths, model_inputs
from simdiff.recovery.methods import RecoveryOutcome
from simdiff.recovery.normal_equations import NormalEquations, best_ridge, ridge

Batches = list[Tensor | Mapping[str, Tensor]]
KEPT = [0, 2, 3, 5]


def tokens(num_windows: int, length: int = 12, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (num_windows, length), generator=generator)


def equations_of(x: Tensor, r: Tensor, w: Tensor, parts: int = 3) -> NormalEquations:
    equations = NormalEquations(x.shape[1], r.shape[1])
    for rows in torch.arange(len(x)).chunk(parts):
        equations.update(x[rows], r[rows], w[rows])
    return equations


@pytest.mark.parametrize("num_features", [1, 7, 300])  # more than one block of columns
def test_ridge_is_the_least_squares_solution(num_features: int) -> None:
    generator = torch.Generator().manual_seed(num_features)
    x = torch.randn(700, num_features, generator=generator, dtype=torch.float64)
    r = torch.randn(700, 5, generator=generator, dtype=torch.float64)
    w = torch.rand(700, generator=generator, dtype=torch.float64) + 0.1
    equations = equations_of(x, r, w)
    strength = 0.03
    root = w.sqrt()[:, None]
    penalty = (strength * (w[:, None] * x.square()).sum(0).mean()).sqrt()
    design = torch.cat([x * root, penalty * torch.eye(num_features, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(design, torch.cat([r * root, r.new_zeros(num_features, 5)]))
    found = ridge(equations, strength)
    assert torch.allclose(found, wanted.solution, rtol=1e-10, atol=1e-12)
    error = (w[:, None] * (r - x @ found).square()).sum()
    assert equations.error(found) == pytest.approx(float(error), rel=1e-12)
    assert equations.energy == pytest.approx(float((w[:, None] * r.square()).sum()), rel=1e-12)


def test_the_strength_is_chosen_on_tokens_that_were_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(460, 20, generator=generator, dtype=torch.float64)
    r = x @ truth + 4 * torch.randn(460, 3, generator=generator, dtype=torch.float64)
    ones = torch.ones(460, dtype=torch.float64)
    fitted, unseen = (
        equations_of(x[:60], r[:60], ones[:60]),
        equations_of(x[60:], r[60:], ones[60:]),
    )
    strengths = (1e-9, 1e-3, 1e-1, 1.0, 1e3)
    fit = best_ridge(fitted, unseen, strengths)
    errors = [unseen.error(ridge(fitted, strength)) / unseen.energy for strength in strengths]
    assert fit.relative_error == pytest.approx(min(errors))
    assert fit.strength == strengths[errors.index(min(errors))]
    assert fit.strength not in (1e-9, 1e3)
    # Where the unseen residuals have nothing to do with the features no correction is best.
    other = equations_of(x[60:], -r[60:], ones[60:])
    assert best_ridge(fitted, other, strengths).correction is None
    assert best_ridge(fitted, other, strengths).relative_error == 1


def test_ridge_on_paper() -> None:
    """Two features 1 and 0 and a residual 3, twice: G = diag(2, 0), whose mean is 1."""
    x = torch.tensor([[1.0, 0.0]] * 2)
    equations = equations_of(x, torch.full((2, 1), 3.0), torch.ones(2), parts=1)
    assert equations.num_tokens == 2
    found = ridge(equations, 0.5)
    assert found.flatten().tolist() == pytest.approx([6 / 2.5, 0])
    assert equations.error(found) == pytest.approx(2 * 0.6**2)
    nothing = equations_of(0 * x, torch.full((2, 1), 3.0), torch.ones(2), parts=1)
    assert ridge(nothing, 0.5).tolist() == [[0.0], [0.0]]
    assert best_ridge(nothing, nothing, (0.5,)).correction is None


def test_rows_of_a_regression() -> None:
    """Three tokens, of which two count; a projection with scale 2, gains 4 and 0.003 and a bias.

    A gain below a thousandth of the largest leaves its entry alone: it could not be corrected.
    """
    run = Correction(None, None, [], [], [], Settings(norm_power=3.0), states=[torch.zeros(1)])
    entered = torch.tensor([[[1.0, 2.0, 2.0], [9.0, 9.0, 9.0], [6.0, 0.0, 0.0]]])
    written = torch.tensor([[[1.0, 7.0], [9.0, 9.0], [3.0, 4.0]]])  # rms 5 and sqrt(12.5)
    wanted = torch.tensor([[[3.0, 4.0], [9.0, 9.0], [0.0, 0.0]]])
    output = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [8.0, 2.0]]])
    rows = torch.tensor([True, False, True])

    def found(kind: str, gain: Tensor | None) -> list[list]:
        projection = SimpleNamespace(scale=2.0, has_bias=True, gain=gain)
        parts = run._rows(projection, (entered, written), kind, output, wanted, rows)
        assert {part.dtype for part in parts} == {torch.float64}
        return [part.tolist() for part in parts]

    x, r, w = found("inputs", None)
    assert x == [[1, 2, 2, 1], [6, 0, 0, 1]]
    assert r == [[1, 1], [-4, -1]]
    assert w == pytest.approx([5**-3, 0])  # a token whose wanted state is zero counts nothing
    x, r, _ = found("outputs", torch.tensor([4.0, 0.003]))
    root = 12.5**0.5
    assert x[0] == pytest.approx([1 / 5, 7 / 5, 1 / 5])
    assert x[1] == pytest.approx([3 / root, 4 / root, 1 / root])
    assert r == [[0.25, 0], [-1, 0]]
    _, r, _ = found("outputs", torch.tensor([-4.0, 0.0050]))
    assert r[0] == pytest.approx([-0.25, 200])


def test_nan_is_refused() -> None:
    equations = NormalEquations(2, 1)
    with pytest.raises(SimdiffError, match="hidden states must be finite, got NaN or Inf"):
        equations.update(torch.tensor([[1.0, torch.nan]]), torch.ones(1, 1), torch.ones(1))
    with pytest.raises(SimdiffError, match="hidden states must be finite, got NaN or Inf"):
        equations.update(torch.ones(1, 2), torch.full((1, 1), torch.inf), torch.ones(1))
    with pytest.raises(SimdiffError, match="strength must be above 0, got 0"):
        ridge(equations, 0.0)


def larger(model: PreTrainedModel) -> PreTrainedModel:
    """Layers that do something, in float64."""
    return decided(model).double()


def corrected(
    model: PreTrainedModel, fitted: Batches, unseen: Batches, settings: Settings | None = None
) -> tuple[PreTrainedModel, RecoveryOutcome]:
    pruned = pruned_copy(model, [i for i in range(6) if i not in KEPT])
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
    pruned = pruned_copy(model, (1, 4))
    own_parameters(pruned)
    damaged = pruned.model.layers[0].mlp.down_proj.weight
    damaged.data += torch.randn_like(damaged)
    text = drawn(model, 24, 12)
    outcome = correct(
        model, pruned, KEPT, [text[:20]], [text[20:]], settings=Settings(strengths=(1e-13,)),
        progress=False,
    )  # fmt: skip
    wanted = model.model.layers[0].mlp.down_proj.weight
    assert torch.allclose(pruned.model.layers[0].mlp.down_proj.weight, wanted, rtol=0, atol=1e-7)
    first, *rest = outcome.details["layers"]
    assert first["relative_error"] < 1e-12
    with torch.no_grad():
        difference = pruned(input_ids=text).logits - model(input_ids=text).logits
    assert float(difference.abs().max()) < 1e-6
    assert len(rest) == 3


FOUND = {
    "llama": "mlp.down_proj", "qwen2": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2",
    "gpt-neox": "mlp.dense_4h_to_h", "falcon": "mlp.dense_4h_to_h", "bloom": "mlp.dense_4h_to_h",
    "granite": "mlp.down_proj", "cohere2": "mlp.down_proj", "phi3": "mlp.down_proj",
    "gemma3": "mlp.down_proj", "olmo2": "mlp.down_proj", "mixtral": None,
}  # fmt: skip
NORMED = ("gemma3", "olmo2")


def unseen_error(
    model: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor, stop: int = 1
) -> float:
    """Σ ‖h − y‖² / ‖h‖² after the first layers that stay, by forwards of both."""
    with Depths(model) as dense, Depths(pruned) as student, torch.no_grad():
        batch = {"input_ids": ids}
        wanted, found = dense.run(batch, None, 0, KEPT[stop]), student.run(batch, None, 0, stop)
    return float(((wanted - found).norm(dim=-1) / wanted.norm(dim=-1)).square().sum())


@pytest.mark.parametrize("features", ["inputs", "outputs"])
@pytest.mark.parametrize("family", FOUND)
def test_families(family: str, features: str) -> None:
    """The correction does to the states what the normal equations say, whatever the layer."""
    model = larger(tiny_family(family))
    if family == "mixtral":  # its experts run in float32 at most
        model = model.float()
    if family == "granite":  # adds its outputs times a factor
        model.config.residual_multiplier = 0.4
        for layer in model.model.layers:
            layer.residual_multiplier = 0.4
    text = tokens(40)
    fitted, unseen = text[:32], text[32:]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = pruned_copy(model, (1, 4))
    pruned = pruned_copy(model, (1, 4))
    run_all(model, pruned, fitted, unseen, family, Settings(features=features))
    if FOUND[family] is not None:
        share = unseen_error(model, pruned, unseen) / unseen_error(model, plain, unseen)
        assert share < 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def run_all(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    fitted: Tensor,
    unseen: Tensor,
    family: str,
    settings: Settings,
) -> None:
    """Correct the first layer alone and compare its error with the predicted one; then the next."""
    run = Correction(model, pruned, KEPT, model_inputs([fitted]), model_inputs([unseen]), settings)
    plain = unseen_error(model, pruned, unseen)
    with depths(model, pruned, autocast=False) as (dense, student):
        run.layer(0, dense, student)
    fit = run.fits[0]
    assert fit.projection == FOUND[family]
    if fit.projection is None:
        return
    assert fit.features == settings.features
    assert fit.relative_error < 1
    share = unseen_error(model, pruned, unseen) / plain
    if family in NORMED:
        assert share < 1
        return
    assert share == pytest.approx(fit.relative_error, rel=1e-6)
    plain = unseen_error(model, pruned, unseen, 2)
    with depths(model, pruned, autocast=False) as (dense, student):
        run.layer(1, dense, student)
    assert [(fit.layer, fit.projection) for fit in run.fits] == [(0, FOUND[family]),
                                                                 (2, FOUND[family])]  # fmt: skip
    share = unseen_error(model, pruned, unseen, 2) / plain
    assert share == pytest.approx(run.fits[1].relative_error, rel=1e-6)


def test_outputs_are_taken_where_inputs_exceed_the_memory_budget() -> None:
    model = larger(make_tiny("llama"))
    text = drawn(model, 40, 12)
    for budget, features in ((4 * 8 * 48**2, "inputs"), (4 * 8 * 48**2 - 1, "outputs")):
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
    pruned = pruned_copy(model, plan.removed)
    outcome = recover(model, plan, text, pruned=pruned, options={}, batch_size=8)
    losses = {entry["corrected"]: entry["nll"] for entry in outcome.details["losses"]}
    chosen = outcome.details["corrected"]
    assert losses[chosen] == min(losses.values())
    # The dense model knows nothing of random tokens: being like it is no better.
    assert min(losses, key=lambda count: losses[count]) == 0
    assert chosen == 0
    assert "the weights are those of the plain cut" in outcome.notes[0]
    plain = pruned_copy(model, plan.removed)
    assert all(a is b for a, b in zip(pruned.parameters(), plain.parameters(), strict=True))


def test_the_first_and_the_last_layer_may_be_cut() -> None:
    model = larger(make_tiny("llama"))
    text = tokens(40)
    for removed in ((0,), (5,), (0, 1, 5)):
        kept = [layer for layer in range(6) if layer not in removed]
        pruned = pruned_copy(model, removed)
        outcome = correct(model, pruned, kept, [text[:32]], [text[32:]], progress=False)
        first = outcome.details["layers"][0]
        assert first["layer"] == (kept[0] if 0 in removed else 4)
        assert first["relative_error"] < 1


def test_what_cannot_be_corrected_is_refused() -> None:
    mixture = larger(tiny_family("mixtral")).float()
    text = tokens(8)
    with pytest.raises(SimdiffError, match="MixtralForCausalLM .* got none"):
        corrected(mixture, [text[:6]], [text[6:]])
    model = make_tiny("llama")
    with pytest.raises(SimdiffError, match="at least 2 windows of text"):
        recover(model, plan_for(6, (1,)), text[:1], pruned=model, options={}, batch_size=8)
    nothing = {"input_ids": text, "attention_mask": torch.zeros_like(text)}
    with pytest.raises(SimdiffError, match="unseen must leave some token"):
        corrected(model, [text], [nothing])
    model.model.layers[3].mlp.up_proj.weight.data[2, 2] = torch.nan
    with pytest.raises(SimdiffError, match="finite, got NaN or Inf"):
        corrected(model, [text[:6]], [text[6:]])
