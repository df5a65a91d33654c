"""Whatever runs a given model runs it in evaluation mode and leaves it as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import simdiff
from simdiff.evaluation.losses import window_losses
from simdiff.models.running import evaluating, in_evaluation
from simdiff.sublayers.structure import find_sublayers
from support.tiny_models import SHAPE


@pytest.fixture
def training() -> PreTrainedModel:
    """With dropout, of which one part is in evaluation mode, and outputs that nobody wants."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=48, attention_dropout=0.5, return_dict=False)
    )
    model.config.output_hidden_states = True
    model.train()
    model.model.layers[2].eval()
    return model


def state(model: PreTrainedModel) -> object:
    modes = [(name, module.training) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    tensors = {name: tensor.clone() for name, tensor in (*model.named_buffers(),)}
    return copy.deepcopy((modes, hooks, attributes, config, generation)), tensors


def assert_same(before: tuple, after: tuple) -> None:
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_everything_runs_in_evaluation_mode(
    training: PreTrainedModel, windows: torch.Tensor, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    documents = [" ".join(f"w{1 + (7 * i + j) % 90}" for j in range(20)) for i in range(20)]
    amount = {"num_windows": 4, "window_length": 16}

    def all_of_it(model: PreTrainedModel) -> list[object]:
        scores = simdiff.score(model, windows, progress=False, sublayers=True)
        plan = simdiff.plan(scores, 2, model=model, windows=windows, bootstrap=0)
        quality = simdiff.evaluate(model, documents, tokenizer=tokenizer, **amount)
        record = simdiff.recover(
            model, plan, tmp_path / "out", documents, tokenizer=tokenizer, overwrite=True, **amount
        )
        names = ("dense", "pruned", "recovered")
        return [
            scores.metrics["cosine_distance"].mean,
            plan.removed,
            quality.dense.perplexity.perplexity,
            *(record.perplexity(name) for name in names),
        ]

    before = state(training)
    found = all_of_it(training)
    assert_same(before, state(training))
    wanted = copy.deepcopy(training).eval()
    wanted.config.return_dict, wanted.config.output_hidden_states = True, False
    assert found == all_of_it(wanted)


def test_a_failure_leaves_the_model_as_it_was(training: PreTrainedModel) -> None:
    before = state(training)
    with pytest.raises(simdiff.SimdiffError, match="token ids must be 0 to 96"):
        simdiff.score(training, torch.full((2, 8), 97), progress=False)
    with pytest.raises(KeyError), evaluating(training):
        raise KeyError
    assert_same(before, state(training))
    assert find_sublayers(training).names
    assert_same(before, state(training))


def test_frequencies_that_long_windows_change_come_back() -> None:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    config = LlamaConfig(
        **SHAPE, intermediate_size=48, max_position_embeddings=8, rope_parameters=rope
    )
    model = LlamaForCausalLM(config).train()
    before = state(model)
    ids = torch.arange(64).reshape(2, 32)
    with pytest.warns(simdiff.errors.Note, match="windows of 32 tokens are longer than the 8"):
        window_losses(model, ids, description=None)
    assert_same(before, state(model))
    assert model.model.rotary_emb.max_seq_len_cached == 8
    with torch.no_grad():
        model(input_ids=ids)
    assert model.model.rotary_emb.max_seq_len_cached == 32  # what a bare forward leaves behind


def test_nested_and_decorated(training: PreTrainedModel) -> None:
    @in_evaluation
    def modes(model: PreTrainedModel, *, more: bool) -> set[bool]:
        with evaluating(model):
            pass
        return {module.training for module in model.modules()} | {not more}

    before = state(training)
    assert modes(training, more=True) == {False}
    assert modes(model=training, more=True) == {False}
    assert_same(before, state(training))


def test_a_compiled_forward_runs_uncompiled(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    """Hooks on modules within are not called by what torch.compile made."""
    wanted = simdiff.score(llama, windows, progress=False)

    def never(*_: object, **__: object) -> object:
        raise AssertionError("the compiled form ran")

    llama.model.compile(backend=never)
    found = simdiff.score(llama, windows, progress=False)
    assert found.metrics == wanted.metrics
