"""Models saved from memory: plain weights, and the source's own files beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

import simdiff
from simdiff.checkpoints.from_memory import check_saveable, origin, write_pruned
from simdiff.errors import SimdiffError
from simdiff.surgery.layers import layers_removed
from support.checkpoints import REMOVED, edit_json, plan_for

WEIGHTS = "model.safetensors"
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(20).view(2, 10) * 3


def packed_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight
        if (
            weight.dim() == 2
            and (".self_attn." in name or ".mlp." in name)
            and "gate.w" not in name
        ):
            blocks = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
            scale = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape)
            stored[name] = stored[name].to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scale
    return stored


def packed_mxfp4(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = {}
    for name, weight in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = weight.shape
            shape = (experts, outer, inner // 32)
            stored[name + "_blocks"] = torch.randint(0, 255, (*shape, 16), dtype=torch.uint8)
            stored[name + "_scales"] = torch.full(shape, 120, dtype=torch.uint8)
        else:
            stored[name] = weight
    return stored


FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "modules_to_not_convert": ["lm_head"],
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
PACKED = {
    "fp8": (Qwen3Config(**SHAPE), packed_fp8, FP8),
    "fp8 experts": (
        Qwen3MoeConfig(**SHAPE, **EXPERTS, moe_intermediate_size=32),
        packed_fp8,
        FP8,
    ),
    "mxfp4": (GptOssConfig(**SHAPE, **EXPERTS, sliding_window=8), packed_mxfp4, MXFP4),
}


@pytest.mark.parametrize("kind", PACKED)
def test_weights_that_loading_unpacked_are_saved_plain(kind: str, tmp_path: Path) -> None:
    config, pack, quantiser = PACKED[kind]
    torch.manual_seed(7)
    source = tmp_path / "dense"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    plain = set(load_file(source / WEIGHTS))
    save_file(pack(load_file(source / WEIGHTS)), source / WEIGHTS, {"format": "pt"})
    edit_json(source / "config.json", quantization_config=quantiser)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    write_pruned(model, None, plan_for(model), make(tmp_path / "small"))
    written = load_file(tmp_path / "small" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert set(written) == {n for n in plain if ".layers.4." not in n and ".layers.5." not in n}
    assert "quantization_config" not in json.loads((tmp_path / "small/config.json").read_text())
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad(), layers_removed(model, REMOVED):
        assert torch.equal(reloaded.eval()(IDS).logits, model(IDS).logits)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture
def source(tiny_checkpoint: Path) -> Path:
    """A directory in the form of transformers 4, with files that are nobody's business."""
    edit_json(
        tiny_checkpoint / "config.json",
        dtype=None,
        torch_dtype="float32",
        rope_parameters=None,
        rope_theta=5e5,
        transformers_version="4.51.0",
        unknown={"a": 1},
    )
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "w96",
    }
    (tiny_checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tiny_checkpoint / "special_tokens_map.json").write_text('{"eos_token":   "w96"}')
    (tiny_checkpoint / "generation_config.json").write_text('{"eos_token_id":   96}')
    (tiny_checkpoint / "modules.json").write_text('[{"path": "1_Pooling"}]')
    make(tiny_checkpoint / "1_Pooling")
    (tiny_checkpoint / "1_Pooling" / "config.json").write_text("{ }")
    return tiny_checkpoint


def differing(source: Path, target: Path) -> set[str]:
    """Names of files that are in one directory alone, or not the same in both."""
    folders = [
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (source, target)
    ]
    return {
        name for name in {*folders[0], *folders[1]} if folders[0].get(name) != folders[1].get(name)
    }


OURS = {"README.md", "config.json", "model.safetensors", "plan.json"}


@pytest.mark.parametrize("way", ["files", "dtype", "object", "recover"])
def test_every_way_leaves_the_sources_files(way: str, source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    plan, small = plan_for(model), tmp_path / "small"
    if way == "files":
        simdiff.prune(source, plan, small)
    elif way == "dtype":
        simdiff.prune(source, plan, small, dtype="bfloat16", device="cpu")
    elif way == "object":
        simdiff.prune(model, plan, small)
    else:
        text = [" ".join(f"w{i + j}" for j in range(20)) for i in range(20)]
        simdiff.recover(source, plan, small, text, num_windows=4, window_length=8, device="cpu")
    repaired = {"recovery.json", "report.html"} if way == "recover" else set()
    assert differing(source, small) == OURS | repaired
    before = json.loads((source / "config.json").read_text())
    after = json.loads((small / "config.json").read_text())
    dtype = {"torch_dtype": "bfloat16"} if way == "dtype" else {}
    assert after == before | {"num_hidden_layers": 4} | dtype
    assert list(after) == list(before)


def test_what_was_changed_in_memory_is_written(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["w97"])
    tokenizer.chat_template = "{{ messages }}"
    model.resize_token_embeddings(98)
    model.generation_config.eos_token_id = 5
    simdiff.prune(model, plan_for(model), tmp_path / "small", tokenizer=tokenizer)
    small = tmp_path / "small"
    assert len(AutoTokenizer.from_pretrained(small)) == len(tokenizer)
    assert not (small / "special_tokens_map.json").exists(), "of another tokenizer"
    assert json.loads((small / "generation_config.json").read_text())["eos_token_id"] == 5
    config = json.loads((small / "config.json").read_text())
    assert (config["vocab_size"], config["rope_theta"]) == (98, 5e5)
    assert AutoModelForCausalLM.from_pretrained(small).lm_head.weight.shape == (98, 32)


def test_a_model_without_a_directory(source: Path, tmp_path: Path, llama: PreTrainedModel) -> None:
    write_pruned(
        llama, AutoTokenizer.from_pretrained(source), plan_for(llama), make(tmp_path / "a")
    )
    assert json.loads((tmp_path / "a" / "config.json").read_text())["num_hidden_layers"] == 4
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    shutil.rmtree(source / "1_Pooling")
    assert origin("") is None
    assert origin("org/absent") is None
    assert origin(str(tmp_path)) is None
    assert origin(str(source)) == source


def test_what_cannot_be_saved_is_refused_before(llama: PreTrainedModel, tmp_path: Path) -> None:
    class Quantiser:
        def is_serializable(self) -> bool:
            return False

    check_saveable(llama)
    plan = plan_for(llama)
    llama.hf_quantizer, llama.is_quantized = Quantiser(), True
    with pytest.raises(SimdiffError, match=r"packed by Quantiser cannot be saved.*quantise"):
        simdiff.prune(llama, plan, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_saving_are_told_in_a_line(llama: PreTrainedModel, tmp_path: Path) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise NotImplementedError("no such\nreverse operation")

    vars(llama)["save_pretrained"] = fail
    with pytest.raises(
        SimdiffError, match="LlamaForCausalLM cannot be saved: Not.*no such reverse"
    ):
        write_pruned(llama, None, plan_for(llama), tmp_path)
