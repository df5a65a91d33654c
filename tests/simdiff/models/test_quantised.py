"""Quantised checkpoints streamed: the scores of the whole model, and what is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import window_losses
from simdiff.models.identity import model_identity
from simdiff.models.quantised import Layout, check_streams
from simdiff.models.streamed import stream_of
from support.streams import scored, streamed, whole

WINDOWS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def quantiser(method: str, pre_quantized: bool = True) -> SimpleNamespace:
    config = SimpleNamespace(quant_method=method)
    return SimpleNamespace(quantization_config=config, pre_quantized=pre_quantized)


def test_what_cannot_be_loaded_by_layers_is_refused_by_name() -> None:
    check_streams(quantiser("bitsandbytes"), "it")
    for method, stored in (("gptq", True), ("awq", True), ("bitsandbytes", False)):
        with pytest.raises(
            SimdiffError, match=f"it: is quantised as '{method}', and .* prune this"
        ):
            check_streams(quantiser(method, stored), "it")


def test_a_layout_undoes_what_a_package_did() -> None:
    layer = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False)).eval()
    before = Layout(layer)
    weight = layer[0].weight
    hook = layer[1].register_forward_hook(lambda *_: None)
    forward = layer[0].forward = lambda x: x
    layer[0].quant_state, layer[1].in_features = 5, 7
    layer[0].register_buffer("scale", torch.ones(1))
    layer[1].weight = nn.Parameter(torch.ones(1))
    del layer[0].bias
    layer[1].train()
    before.restore()
    assert layer[0].weight is weight
    assert layer[0].bias is not None
    assert layer[1].weight.shape == (2, 3)
    assert not hasattr(layer[0], "quant_state")
    assert not list(layer.buffers())
    assert layer[1].in_features == 3
    # Those are of who runs the layer.
    assert layer[0].forward is forward
    assert layer[1].training
    assert hook.id in layer[1]._forward_hooks


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def in_bitsandbytes(directory: Path, bits: int) -> None:
    from transformers import BitsAndBytesConfig

    model().save_pretrained(directory / "plain")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    )
    quantised = LlamaForCausalLM.from_pretrained(
        directory / "plain", quantization_config=config, device_map={"": "cpu"}
    )
    quantised.save_pretrained(directory)


def in_compressed_tensors(directory: Path, bits: int) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    content = {
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    config = QuantizationConfig(**content, quantization_status=QuantizationStatus.FROZEN)
    packed = model()
    apply_quantization_config(packed, config)
    for module in packed.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.float().view(len(module.weight), -1, 32)
            module.weight_scale.data.copy_(groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
    ModelCompressor(config).compress_model(packed)
    directory.mkdir()
    tensors = {name: value.contiguous() for name, value in packed.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    entries = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    whole_config = packed.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": content | entries,
    }
    (directory / "config.json").write_text(json.dumps(whole_config))


MAKERS = {"bitsandbytes": in_bitsandbytes, "compressed_tensors": in_compressed_tensors}


@pytest.mark.parametrize(
    ("package", "bits"), [("bitsandbytes", 4), ("bitsandbytes", 8), ("compressed_tensors", 4)]
)
def test_the_numbers_of_the_whole_model(package: str, bits: int, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs a quantiser's package, {package}")
    MAKERS[package](tmp_path / "model", bits)
    expected = whole(tmp_path / "model")
    with torch.no_grad():
        expected(input_ids=WINDOWS)  # some unpack themselves in the first forward, as loading does
    model = streamed(tmp_path / "model", memory=0, folder=tmp_path / "states")
    stream = stream_of(model)
    assert stream is not None
    assert model_identity(model, "") == model_identity(expected, "")
    layers = model.model.layers
    held = [dict(vars(module)) for module in layers.modules()]
    assert scored(model) == scored(expected)
    assert stream.bytes_read == sum(map(stream.num_bytes, range(6)))
    assert window_losses(model, WINDOWS) == window_losses(expected, WINDOWS)
    for module, before in zip(layers.modules(), held, strict=True):
        assert vars(module).keys() == before.keys()
    assert all(tensor.is_meta for tensor in (*layers.parameters(), *layers.buffers()))
