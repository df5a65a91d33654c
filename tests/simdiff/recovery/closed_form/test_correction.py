"""The correction of one layer after another, whatever the family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs
from simdiff.models.partial_forward import PartialForward
from simdiff.recovery.closed_form.correction import Correction, Settings
from simdiff.surgery.copies import sharing_copy
from support.closed_form import KEPT, larger, tokens
from support.families import tiny as tiny_family


def test_rows_of_a_regression() -> None:
    """Three tokens, of which two count; a projection with scale 2, gains 4 and 0.003 and a bias.

    A gain below a thousandth of the largest leaves its entry alone: it could not be corrected.
    """
    none = torch.zeros(1, dtype=torch.float64)
    run = Correction(None, None, [], [], [], Settings(norm_power=3.0))
    entered = torch.tensor([[[1.0, 2.0, 2.0], [9.0, 9.0, 9.0], [6.0, 0.0, 0.0]]])
    written = torch.tensor([[[1.0, 7.0], [9.0, 9.0], [3.0, 4.0]]])  # rms 5 and sqrt(12.5)
    wanted = torch.tensor([[[3.0, 4.0], [9.0, 9.0], [0.0, 0.0]]])
    output = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [8.0, 2.0]]])
    rows = torch.tensor([True, False, True])

    def found(kind: str, gain: Tensor | None) -> list[list]:
        projection = SimpleNamespace(scale=2.0, has_bias=True, gain=gain)
        parts = run._rows(projection, (entered, written), kind, output, wanted, rows, none)
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


def larger_family(family: str) -> PreTrainedModel:
    model = larger(tiny_family(family))
    if family == "granite":  # adds its outputs times a factor
        model.config.residual_multiplier = 0.4
        for layer in model.model.layers:
            layer.residual_multiplier = 0.4
    return model


FOUND = {
    "llama": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
    "gpt-neox": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "bloom": "mlp.dense_4h_to_h",
    "granite": "mlp.down_proj",
    "cohere2": "mlp.down_proj",
    "phi3": "mlp.down_proj",
    "gemma3": "mlp.down_proj",
    "olmo2": "mlp.down_proj",
    "mixtral": None,
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gemma3"])
def test_the_states_that_leave_a_corrected_layer(family: str) -> None:
    """They are those of the layer as it is now, although it has run before it was corrected."""
    model = larger_family(family)
    pruned = sharing_copy(model, (1, 4))
    texts = [model_inputs(part.split(16), "test") for part in (tokens(40)[:32], tokens(40)[32:])]
    run = Correction(model, pruned, list(KEPT), *texts, Settings())
    with torch.no_grad(), PartialForward(model) as dense, PartialForward(pruned) as student:
        for position in range(2):
            before = list(run.states)
            assert len(list(run.layer(position, dense, student))) == run.num_steps
            for index, batch in enumerate(run.batches):
                start, first = (None, 0) if position == 0 else (before[index], position)
                wanted = student.run(batch, start, first, position + 1)
                assert torch.allclose(run.states[index], wanted, rtol=1e-9, atol=1e-12)
    assert len(run.corrections) == 2


NORMED = ("gemma3", "olmo2")


def unseen_error(
    model: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor, stop: int = 1
) -> float:
    """Σ ‖h − y‖² / ‖h‖² after the first layers that stay, by forwards of both."""
    with PartialForward(model) as dense, PartialForward(pruned) as student, torch.no_grad():
        batch = {"input_ids": ids}
        wanted, found = dense.run(batch, None, 0, KEPT[stop]), student.run(batch, None, 0, stop)
    return float(((wanted - found).norm(dim=-1) / wanted.norm(dim=-1)).square().sum())


@pytest.mark.parametrize("features", ["inputs", "outputs"])
@pytest.mark.parametrize("family", FOUND)
def test_families(family: str, features: str) -> None:
    """The correction does to the states what the normal equations say, whatever the layer."""
    model = larger_family(family)
    if family == "mixtral":  # its experts run in float32 at most
        model = model.float()
    text = tokens(40)
    fitted, unseen = text[:32], text[32:]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = sharing_copy(model, (1, 4))
    pruned = sharing_copy(model, (1, 4))
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
    run = Correction(
        model,
        pruned,
        KEPT,
        model_inputs([fitted], "recovery"),
        model_inputs([unseen], "recovery"),
        settings,
    )
    plain = unseen_error(model, pruned, unseen)
    with PartialForward(model) as dense, PartialForward(pruned) as student:
        assert len(list(run.layer(0, dense, student))) == run.num_steps
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
    with PartialForward(model) as dense, PartialForward(pruned) as student:
        assert len(list(run.layer(1, dense, student))) == run.num_steps
    assert [(fit.layer, fit.projection) for fit in run.fits] == [
        (0, FOUND[family]),
        (2, FOUND[family]),
    ]
    share = unseen_error(model, pruned, unseen, 2) / plain
    assert share == pytest.approx(run.fits[1].relative_error, rel=1e-6)
