"""The correction of one layer after another, whatever the family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs
from simdiff.models.partial_forward import PartialForward
from simdiff.recovery.closed_form.correction import Correction
from simdiff.recovery.closed_form.probing import arriving_scale
from simdiff.recovery.closed_form.projections import InputMap, find_inner_parts
from simdiff.recovery.closed_form.regression import rows_of
from simdiff.recovery.closed_form.settings import Settings
from simdiff.surgery.copies import sharing_copy
from support.closed_form import KEPT, larger, tokens
from support.families import tiny as tiny_family
from support.own_text import decided, drawn


def test_rows_of_a_regression() -> None:
    """Three tokens, of which two count; a projection with scale 2, gains 4 and 0.003 and a bias.

    A gain below a thousandth of the largest leaves its entry alone: it could not be corrected.
    """
    none = torch.zeros(1, dtype=torch.float64)
    entered = torch.tensor([[[1.0, 2.0, 2.0], [9.0, 9.0, 9.0], [6.0, 0.0, 0.0]]])
    written = torch.tensor([[[1.0, 7.0], [9.0, 9.0], [3.0, 4.0]]])  # rms 5 and sqrt(12.5)
    wanted = torch.tensor([[[3.0, 4.0], [9.0, 9.0], [0.0, 0.0]]])
    output = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [8.0, 2.0]]])
    rows = torch.tensor([True, False, True])

    def found(kind: str, gain: Tensor | None) -> list[list]:
        projection = SimpleNamespace(scale=2.0, has_bias=True, gain=gain)
        parts = rows_of(projection, (entered, written), kind, output, wanted, rows, none, 3.0)
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
        assert len(list(run.begin(dense, student))) == len(run.batches)
        for position in range(2):
            before = list(run.states)
            assert len(list(run.layer(position, dense, student))) == 3 * len(run.batches) + 1
            for index, batch in enumerate(run.batches):
                wanted = student.run(batch, before[index], position, position + 1)
                assert torch.allclose(run.states[index], wanted, rtol=1e-9, atol=1e-12)
    assert len(run.corrections) == 2


NORMED = ("gemma3", "olmo2")


def unseen_error(
    model: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor, stop: int = 1
) -> float:
    """Σ ‖h − y‖² / ‖h‖^p after the first layers that stay, by forwards of both."""
    with PartialForward(model) as dense, PartialForward(pruned) as student, torch.no_grad():
        batch = {"input_ids": ids}
        wanted, found = dense.run(batch, None, 0, KEPT[stop]), student.run(batch, None, 0, stop)
    return weighted_error(wanted, found)


def weighted_error(wanted: Tensor, found: Tensor) -> float:
    """Σ ‖h − y‖² / ‖h‖^p over tokens."""
    weights = wanted.norm(dim=-1) ** -Settings().norm_power
    return float((weights * (wanted - found).square().sum(dim=-1)).sum())


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
    with torch.no_grad(), PartialForward(model) as dense, PartialForward(pruned) as student:
        for _ in (*run.begin(dense, student), *run.layer(0, dense, student)):
            pass
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
    with PartialForward(model) as dense, PartialForward(pruned) as student:
        for _ in run.layer(1, dense, student):
            pass
    assert [(fit.layer, fit.projection) for fit in run.fits] == [
        (0, FOUND[family]),
        (2, FOUND[family]),
    ]
    left = unseen_error(model, pruned, unseen, 2)
    with run.corrections[1][-1].undone():
        share = left / unseen_error(model, pruned, unseen, 2)
    assert share == pytest.approx(run.fits[1].relative_error, rel=1e-6)


INNER = {
    "llama": [3, ("self_attn.o_proj", "post_attention_layernorm"), 2],
    "gpt2": [1, ("attn.c_proj", "ln_2"), 1],
    "gemma3": [3, 2],  # attention writes by way of a norm
    "olmo2": [3, 2],
    "minicpm3": [2, ("self_attn.o_proj", "post_attention_layernorm"), 2],
    "falcon": [2, 1],  # attention beside the MLP: one norm before both, no stream between
    "phi3": [1, ("self_attn.o_proj", "post_attention_layernorm"), 1],
    "mixtral": [3, ("self_attn.o_proj", "post_attention_layernorm")],
    "qwen3-next": [2, ("linear_attn.out_proj", "post_attention_layernorm"), 3],
    "longcat-flash": [  # two of each in one layer
        2,
        ("self_attn.0.o_proj", "post_attention_layernorm.0"),
        2,
        ("mlps.0.down_proj", "input_layernorm.1"),
        2,
        ("self_attn.1.o_proj", "post_attention_layernorm.1"),
        2,
    ],
}


@pytest.mark.parametrize("family", INNER)
@torch.no_grad()
def test_what_reads_and_writes_within_a_layer(family: str) -> None:
    """How many modules read one tensor, and what writes to the stream before which module."""
    model = decided(tiny_family(family))
    with PartialForward(model) as partial:
        batch = {"input_ids": tokens(1)}
        states = partial.run(batch, None, 0, 1)
        found = find_inner_parts(
            partial.layers[1], lambda: partial.run(batch, states, 1, 2), states.shape[-1]
        )
    told = [
        len(part.names) if isinstance(part, InputMap) else (part.name, part.point) for part in found
    ]
    assert told == INNER[family]


@pytest.mark.parametrize("factor", [1.0, 0.22, 1e-3])
@torch.no_grad()
def test_a_shift_that_hardly_arrives_is_measured_by_what_arrives(factor: float) -> None:
    """As that of queries, of which a softmax leaves less than the tolerance of a whole shift."""
    linear = torch.nn.Linear(32, 32, bias=False)
    states = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    added = states + factor * linear(states)
    found = arriving_scale(linear, lambda: states + factor * linear(states), added)
    assert found == pytest.approx(factor, rel=1e-3)
    bent = states + factor * torch.tanh(linear(states))
    assert (
        arriving_scale(linear, lambda: states + factor * torch.tanh(linear(states)), bent) is None
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gemma3"])
def test_errors_within_a_corrected_layer(family: str) -> None:
    """What modules make of what they read, and the stream behind attention, come closer."""
    model = larger_family(family)
    pruned = sharing_copy(model, (1, 4))
    text = drawn(model, 40, 12)
    texts = [model_inputs([part], "test") for part in (text[:32], text[32:])]
    run = Correction(model, pruned, list(KEPT), *texts, Settings())
    with torch.no_grad(), PartialForward(model) as dense, PartialForward(pruned) as student:
        for _ in (*run.begin(dense, student), *run.layer(0, dense, student)):
            pass
        found = find_inner_parts(
            student.layers[1],
            lambda: student.run(run.batches[0], run.states[0], 1, 2),
            run.states[0].shape[-1],
        )
        for _ in run.prepare(1, dense, student):
            pass
        fits, changes = list(run.parts), {change.module: change for change in run.changes}
        assert [fit.modules for fit in fits] == [part.names for part in found]
        unseen, dense_states, states = run.batches[1], run.targets[1], run.states[1]
        for part, fit in zip(found, fits, strict=True):
            wanted = dense.entering_module(unseen, dense_states, KEPT[1], part.place)
            entered = student.entering_module(unseen, states, 1, part.place)
            change = changes.get(part.modules[0])
            if change is None:
                assert fit.strength is None
                continue
            if isinstance(part, InputMap):
                theirs = dense.layers[KEPT[1]].get_submodule(part.names[0])(wanted)
                ours = part.modules[0](entered)
                with change.undone():
                    before = part.modules[0](entered)
                assert (theirs - ours).norm() < (theirs - before).norm()
                continue
            with change.undone():
                before = student.entering_module(unseen, states, 1, part.place)
            share = weighted_error(wanted, entered) / weighted_error(wanted, before)
            assert share == pytest.approx(fit.relative_error, rel=1e-6)
            assert share < 1
        assert len(changes) >= 2
