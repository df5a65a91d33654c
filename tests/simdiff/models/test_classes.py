"""The class that a checkpoint is of: its own, or a reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import simdiff
from simdiff.errors import SimdiffError
from simdiff.models.classes import auto_class
from simdiff.models.loading import meta_model
from simdiff.models.structure import find_decoder_layers
from simdiff.provenance.verify import verify
from simdiff.surgery.config import cut_config
from support.families import FAMILIES, SHAPE
from support.vision_models import VISION_FAMILIES, tiny_vision, vision_config


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_vision_language_checkpoint_is_of_its_own_class(family: str) -> None:
    config = vision_config(family)
    model = meta_model(config)
    assert type(model).__name__ == config.architectures[0]
    found = find_decoder_layers(model)
    assert len(found) == 6
    assert "vision" not in found.path
    kept = [0, 2, 3, 4, 5] if family != "gemma3" else [0, 1, 2, 3, 4]
    cut = cut_config(config, kept, model_class=type(model)).config
    smaller = meta_model(cut)
    assert len(find_decoder_layers(smaller)) == 5
    assert type(smaller) is type(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_checkpoint_is_of_its_causal_class(family: str) -> None:
    name, entries = FAMILIES[family]
    config = getattr(transformers, name)(**entries)
    assert auto_class(config) is AutoModelForCausalLM  # no architectures: the stock causal class
    config.architectures = [config.__class__.__name__.replace("Config", "ForCausalLM")]
    assert auto_class(config) is AutoModelForCausalLM


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.BartConfig(architectures=["BartForConditionalGeneration"]), "encoder-deco"),
        (transformers.WhisperConfig(architectures=["WhisperForConditionalGe"]), "encoder-decoder"),
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
        (transformers.T5Config(), "encoder-decoder"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "give the language model"),
        (LlamaConfig(architectures=["LlamaForRewardModel"]), "give the language model that it was"),
        (LlamaConfig(architectures=["LlamaModel"]), "LlamaModel has no language-model head"),
        (LlamaConfig(architectures=["LlamaSomething"]), "LlamaSomething, which is something else"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "reads text in both direct"),
        (transformers.BertConfig(), "reads text in both directions .is_decoder is false"),
        (transformers.BertConfig(architectures=["BertLMHeadModel"]), "is_decoder is false"),
        (transformers.CLIPConfig(architectures=["CLIPModel"]), "CLIPModel has no language-model"),
        (transformers.ViTConfig(), "must be a language model of stock transformers, got 'vit'"),
    ],
)
def test_other_classes_are_refused_in_a_sentence(config: Any, words: str) -> None:
    with pytest.raises(SimdiffError, match=words) as error:
        auto_class(config, "model 'x'")
    assert str(error.value).startswith("model 'x': ")
    assert len(str(error.value)) < 300


def test_a_fork_of_a_causal_class_is_the_stock_one() -> None:
    for config in (
        LlamaConfig(**SHAPE, architectures=["LLaMAForCausalLM"]),
        transformers.BertConfig(is_decoder=True, architectures=["BertLMHeadModel"]),
        transformers.BartConfig(is_encoder_decoder=False, architectures=["BartForCausalLM"]),
    ):
        assert auto_class(config) is AutoModelForCausalLM


@pytest.mark.parametrize("family", ["qwen2-vl", "llava"])
def test_a_vision_language_model_is_scored_cut_and_verified_by_name(
    family: str, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    model = tiny_vision(family)
    folder = tmp_path / family
    model.save_pretrained(folder)
    for file in tiny_checkpoint.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    amount = {"num_windows": 4, "window_length": 16}
    scores = simdiff.score(folder, tiny_text, progress=False, **amount)
    assert scores.model["architecture"] == type(model).__name__
    plan = simdiff.plan(scores, 2, model=folder, evaluation_windows=2, bootstrap=0)
    small = simdiff.prune(folder, plan, tmp_path / "small")
    saved = simdiff.prune(model, plan, tmp_path / "saved")
    assert (small / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert f"model = {type(model).__name__}.from_pretrained" in (small / "README.md").read_text()
    assert [check for check in verify(small, str(folder)) if check.passed is False] == []
    quality = simdiff.evaluate([folder, small], tiny_text, **amount)
    assert quality.models[1].num_parameters < quality.dense.num_parameters
