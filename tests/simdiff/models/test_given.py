"""Objects: what wraps a model is taken off where that is right, and refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

import simdiff
from simdiff.errors import SimdiffError
from simdiff.models.given import given_model


def never(*_: object, **__: object) -> object:
    raise AssertionError("the compiled form ran")


def test_compiled_and_parallel_models_stand_for_the_model_within(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    wanted = simdiff.score(llama, windows, progress=False)
    plan = simdiff.plan(wanted, 2, bootstrap=0)
    compiled = torch.compile(llama, backend=never)
    for wrapped in (compiled, nn.DataParallel(llama), nn.DataParallel(compiled)):
        assert given_model(wrapped, "score") is llama
        assert simdiff.score(wrapped, windows, progress=False).metrics == wanted.metrics
        assert simdiff.plan(wanted, 2, model=wrapped, windows=windows, bootstrap=0).removed
    assert simdiff.prune(compiled, plan, tmp_path / "out").is_dir()
    assert simdiff.prune(compiled, plan) is llama
    assert llama.config.num_hidden_layers == 4


class Wrapper(nn.Module):
    """As reinforcement learning puts a value head beside a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model


class Pipeline:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def adapted(model: PreTrainedModel, whole: bool) -> Any:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    return wrapped if whole else wrapped.get_base_model()


def compiled_layer(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend=never)
    return model


def encoder_decoder(model: PreTrainedModel) -> PreTrainedModel:
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 97}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(**size, **heads, encoder_ffn_dim=16, decoder_ffn_dim=16)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: adapted(model, True), r"got PeftModel: merge it first \(model = model.mer"),
        (lambda model: adapted(model, False), r"without adapters, got LlamaForCausalLM: merge it"),
        (compiled_layer, r"model.layers.1 of the model was replaced by its compiled form: give"),
        (Wrapper, "got Wrapper: give its .pretrained_model"),
        (Pipeline, "got Pipeline: give its .model"),
        (lambda model: nn.Linear(2, 2), "must be a model of transformers, .*, got Linear"),
        (lambda model: None, "got NoneType"),
        (lambda model: model.to("meta"), "must have values, got some on the meta device"),
        (lambda model: model.model, "LlamaModel has no language-model head"),
        (lambda model: LlamaForSequenceClassification(model.config), "head of a classifier"),
        (encoder_decoder, "BartForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_other_objects_are_refused_with_what_to_do(
    make: Callable[[PreTrainedModel], Any],
    words: str,
    llama: PreTrainedModel,
    windows: torch.Tensor,
    tmp_path: Path,
) -> None:
    plan = simdiff.plan(simdiff.score(llama, windows, progress=False), 1, bootstrap=0)
    model = make(llama)
    calls: tuple[Callable[[], object], ...] = (
        lambda: simdiff.score(model, windows, progress=False),
        lambda: simdiff.prune(model, plan),
        lambda: simdiff.prune(model, plan, tmp_path / "out"),
        lambda: simdiff.evaluate([model], ["w1 w2"]),
        lambda: simdiff.recover(model, plan, tmp_path / "out", ["w1 w2"]),
    )
    for call in calls:
        if "meta" in words and call in calls[1:3]:
            continue  # names and shapes are enough
        with pytest.raises(SimdiffError, match=words) as error:
            call()
        assert len(str(error.value)) < 300
    assert list(tmp_path.iterdir()) == []


def test_names_of_types_are_not_models() -> None:
    assert issubclass(LlamaModel, PreTrainedModel)
    with pytest.raises(SimdiffError, match="got type"):
        given_model(LlamaModel, "score")
