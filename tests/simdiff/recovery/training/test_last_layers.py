"""Training the last layers themselves: what is trained, from where, and what is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.last_layers import LastLayers
from simdiff.recovery.training.options import FineTuningOptions
from simdiff.recovery.training.step import Student
from simdiff.surgery.copies import replace_parameter, sharing_copy
from support.own_text import drawn
from support.tiny_models import make_tiny
from support.training import SMALL, equal, trained, weights

PARTIAL = replace(SMALL, last_layers=2, learning_rate=3e-3)
HEADS = {
    "llama": {"model.norm.weight", "lm_head.weight"},
    "qwen2": {"model.norm.weight", "lm_head.weight"},
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},  # its head is the embedding
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_and_what_is_left(family: str, dtype: torch.dtype) -> None:
    dense = make_tiny(family).to(dtype)
    before, model = weights(dense), sharing_copy(dense, (2, 3))
    plain = weights(model)
    last = LastLayers(model, 2, torch.float32)
    path = "transformer.h" if family == "gpt2" else "model.layers"
    late = {n for n in plain if n.startswith((f"{path}.2.", f"{path}.3."))}
    assert set(last.targets) == late | HEADS[family]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(last.targets)
    assert all(parameter.dtype == torch.float32 for parameter in last.parameters().values())
    kept = {name: value + 0.25 for name, value in last.state().items()}
    last.load(kept)
    last.merge()
    assert equal(weights(dense), before), "the dense model stays as it is"
    assert equal(weights(model), plain | {name: kept[name].to(dtype) for name in kept})
    for one in (dense, model):
        assert all(parameter.requires_grad for parameter in one.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    again = LastLayers(model, 4, torch.float32)
    with torch.no_grad():
        for parameter in again.parameters().values():
            parameter.zero_()
    again.remove()
    assert equal(weights(model), plain | {name: kept[name].to(dtype) for name in kept})


def corrected(dense: PreTrainedModel) -> PreTrainedModel:
    """Cut, with another weight in the layer before the cut, as the closed form leaves it."""
    pruned = sharing_copy(dense, (2, 3))
    module = pruned.get_submodule("model.layers.1.mlp.down_proj")
    replace_parameter(module, "weight", 1.3 * module.weight)
    return pruned


def gradients(
    dense: PreTrainedModel, train: Examples, options: FineTuningOptions
) -> dict[str, Tensor]:
    student = Student(corrected(dense), train, options, dense)
    student.gradients(0)
    found = {name: p.grad.clone() for name, p in student.trained.parameters().items()}
    student.discard()
    return found


def test_gradients_are_those_of_the_whole_model(dense: PreTrainedModel) -> None:
    """Examples of several lengths, from kept states, against autograd on one after the other."""
    tokens = drawn(dense, 6, 24)
    mask = torch.arange(24) < torch.tensor([24, 9, 15, 24, 5, 20])[:, None]
    counted = mask.clone()
    counted[:, :2] = False
    padded = Examples(tokens.where(mask, 0), mask, counted, {})
    options = replace(PARTIAL, batch_size=6, micro_batch_size=3)
    plain = corrected(dense)
    total = torch.zeros(())
    for row, length in zip(tokens, mask.sum(1).tolist(), strict=True):
        ids = row[None, :length]
        with torch.no_grad():
            wanted = dense(input_ids=ids).logits.log_softmax(-1)[0, 1:-1]
        found = plain(input_ids=ids).logits.log_softmax(-1)[0, 1:-1]
        total = total + (wanted.exp() * (wanted - found)).sum()
    names = set(gradients(dense, padded, options))
    assert "lm_head.weight" in names
    late = {name: p for name, p in plain.named_parameters() if name in names}
    slopes = torch.autograd.grad(total / int(counted.sum()), list(late.values()))
    exact = dict(zip(late, slopes, strict=True))
    assert max(float(slope.abs().max()) for slope in slopes) > 1e-3
    for case in (options, replace(options, gradient_checkpointing=True)):
        for name, slope in gradients(dense, padded, case).items():
            assert torch.allclose(slope, exact[name], rtol=1e-3, atol=1e-6), name


def test_what_lies_before_is_run_once(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    student = Student(sharing_copy(dense, (2, 3)), text[0], PARTIAL, dense)
    modules = [
        model.get_submodule(f"model.layers.{layer}.mlp")
        for model in (student.model, dense)
        for layer in (1, 2)
    ]
    runs = dict.fromkeys(modules, 0)
    for module in modules:
        module.register_forward_hook(lambda m, *_: runs.update({m: runs[m] + 1}))
    for step in range(9):  # of 8 examples: all 64, and some of them again
        student.gradients(step)
    for _ in range(2):
        student.evaluate(text[1])
    before, _, shared, behind = (runs[module] for module in modules)
    assert before == len(text[0]) + len(text[1])
    assert shared == 0, "the dense model has the same one"
    assert behind == len(text[0])
    assert student.steps_within(0.0, 10) == 0
    student.discard()


@pytest.mark.parametrize("count", [0, 5])
def test_layers_that_are_not_there(
    dense: PreTrainedModel, text: tuple[Examples, Examples], count: int
) -> None:
    with pytest.raises(SimdiffError, match="last_layers must be"):
        trained(dense, text, replace(PARTIAL, last_layers=count))
    assert not any("forward" in vars(module) for module in dense.modules())


def test_all_layers_in_bfloat16(dense: PreTrainedModel, text: tuple[Examples, Examples]) -> None:
    """From the embeddings on, with products in 16 bits."""
    before = weights(dense)
    model, result = trained(
        dense, text, replace(PARTIAL, last_layers=4, compute_dtype="bfloat16", steps=6)
    )
    assert result.curve[-1]["set_apart_loss"] < result.curve[0]["set_apart_loss"]
    assert result.compute_dtype == "bfloat16"
    assert equal(weights(dense), before)
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
