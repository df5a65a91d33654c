"""Checkpoints cut as files: the bytes that saving from memory gives, and what goes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, PreTrainedModel

from simdiff.checkpoints.cut import cut_checkpoint, write_cut
from simdiff.checkpoints.from_memory import write_pruned
from simdiff.checkpoints.weight_index import INDEX, read_weights
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.io.outputs import new_directory
from simdiff.planning.plan import PruningPlan
from simdiff.surgery.layers import layers_removed
from support.checkpoints import (
    CONFIGS,
    KEPT,
    REMOVED,
    ROPE,
    content,
    edit_json,
    plan_for,
    read_raw,
    save_model,
)

IDS = torch.arange(20).view(2, 10) * 3


def prune(source: Path, plan: PruningPlan, target: Path, size: str = "50GB") -> tuple[str, ...]:
    cut = cut_checkpoint(source, plan, max_shard_size=size)
    with new_directory(target) as scratch:
        write_cut(cut, scratch)
    return cut.notes


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("family", CONFIGS)
def test_same_bytes_as_from_memory(family: str, size: str, tmp_path: Path) -> None:
    """Every file, weights and index and config, and the logits after a stock reload."""
    model = save_model(family, tmp_path / "dense")  # always in shards
    plan = plan_for(model)
    prune(tmp_path / "dense", plan, tmp_path / "disk", size)
    (tmp_path / "memory").mkdir()
    write_pruned(model, None, plan, tmp_path / "memory", max_shard_size=size)
    ours, wanted = content(tmp_path / "disk"), content(tmp_path / "memory")
    assert sorted(ours) == sorted(wanted)
    assert ("model.safetensors" in ours) == (size == "50GB")
    assert [name for name in ours if ours[name] != wanted[name]] == []
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "disk", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad(), layers_removed(model, REMOVED):
        assert torch.equal(reloaded.eval()(IDS).logits, model(IDS).logits)


def test_bytes_are_moved_not_converted(tmp_path: Path) -> None:
    """bfloat16 from one file; every tensor has the bytes it had, read by hand."""
    model = save_model("llama", tmp_path / "dense", "50GB", "bfloat16")
    prune(tmp_path / "dense", plan_for(model), tmp_path / "small")
    old, new = ({}, {})
    for tensors, folder in ((old, "dense"), (new, "small")):
        header, data = read_raw(tmp_path / folder / "model.safetensors")
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], data[first:end])
    for index, layer in enumerate(KEPT):
        for name in [name for name in old if name.startswith(f"model.layers.{layer}.")]:
            assert new.pop(name.replace(f".{layer}.", f".{index}.", 1)) == old[name]
    assert new == {name: old[name] for name in old if ".layers." not in name}
    assert {dtype for dtype, _, _ in old.values()} == {"BF16"}


def test_names_without_the_base_prefix_stay_as_they_are(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints call a layer h.0, and hold buffers of old versions."""
    model = save_model("gpt2", tmp_path / "dense", "50GB")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(6)}
    save_file(tensors, path, metadata={"format": "pt"})
    prune(tmp_path / "dense", plan_for(model), tmp_path / "small")
    names = set(load_file(tmp_path / "small" / "model.safetensors"))
    assert {name.split(".")[1] for name in names if name.startswith("h.")} == set("0123")
    assert "h.3.attn.bias" in names
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad(), layers_removed(model, REMOVED):
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)


def add_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def test_speculative_heads_follow_the_last_layer(tmp_path: Path) -> None:
    """DeepSeek-V3's MTP head is layer 6 of 0 to 5; engines look for it at the number of layers."""
    model = save_model("deepseek-v3", tmp_path / "dense", "50GB")
    head = {
        "model.layers.6.eh_proj.weight": torch.randn(32, 64),
        "model.layers.6.mlp.experts.1.up_proj.weight": torch.randn(16, 32),
    }
    add_tensors(tmp_path / "dense", head)
    notes = prune(tmp_path / "dense", plan_for(model), tmp_path / "small")
    assert "layer 6, a head behind the last layer, is layer 4 now" in notes
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert not [name for name in small if ".layers.5." in name or ".layers.6." in name]
    for name, tensor in head.items():
        assert torch.equal(small[name.replace(".6.", ".4.")], tensor)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) == 1
    add_tensors(tmp_path / "dense", {"model.layers.7.eh_proj.weight": torch.randn(32, 64)})
    with pytest.raises(SimdiffError, match="model.layers has 0-7"):  # more than config declares
        cut_checkpoint(tmp_path / "dense", plan_for(model))


def test_a_tower_of_the_same_depth_is_not_the_decoder(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense", "50GB")
    tower = {f"vision_tower.layers.{layer}.weight": torch.randn(2) for layer in range(6)}
    add_tensors(tmp_path / "dense", tower)
    prune(tmp_path / "dense", plan_for(model), tmp_path / "small")
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert all(torch.equal(small[name], tensor) for name, tensor in tower.items())
    assert len({n.split(".")[2] for n in small if n.startswith("model.layers.")}) == 4


def test_tied_weights_that_are_stored_twice_stay_so(tmp_path: Path) -> None:
    model = save_model("llama, tied", tmp_path / "dense", "50GB")
    embedding = load_file(tmp_path / "dense" / "model.safetensors")["model.embed_tokens.weight"]
    add_tensors(tmp_path / "dense", {"lm_head.weight": embedding.clone()})
    prune(tmp_path / "dense", plan_for(model), tmp_path / "small", "20KB")
    weights = read_weights(tmp_path / "small").tensors
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(weights)


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "dynamic": {
        r"-:model\.layers\.4\..*": {},
        r"+:.*\.layers\.5\.mlp": {"bits": 8},
        r"-:.*layers\.(0|1|2)\..*": {},
    },
    "modules_to_not_convert": [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.5.self_attn.q_proj",
        "re:.*layers.*gate",
        r"re:model\.layers\.\d+\.x",
        "layers.3",
        "vision_tower.layers.4",
    ],
}


def quantise(directory: Path) -> None:
    """Give the projections the tensors that GPTQ stores instead of a weight."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        base = name.removesuffix("weight")
        tensors[base + "qweight"] = torch.randint(-99, 99, (columns // 8, rows), dtype=torch.int32)
        tensors[base + "scales"] = torch.randn(columns // 16, rows).half()
        tensors[base + "g_idx"] = torch.arange(columns, dtype=torch.int32)
    tensors["vision_tower.layers.4.weight"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(directory / "config.json", quantization_config=GPTQ)
    (directory / "quantize_config.json").write_text(json.dumps(GPTQ))


def test_packed_layers_are_copied_and_their_lists_renumbered(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense", "50GB")
    quantise(tmp_path / "dense")
    prune(tmp_path / "dense", plan_for(model), tmp_path / "small")  # 0 2 3 5 become 0 1 2 3
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "small"))
    for index, layer in enumerate(KEPT):
        for kind in ("qweight", "scales", "g_idx"):
            name = f"model.layers.{{}}.mlp.down_proj.{kind}"
            assert torch.equal(new[name.format(index)], old[name.format(layer)])
    wanted = GPTQ | {
        "dynamic": {r"+:.*\.layers\.3\.mlp": {"bits": 8}, r"-:.*layers\.(0|1)\..*": {}},
        "modules_to_not_convert": [
            "lm_head",
            "model.layers.3.self_attn.q_proj",
            "re:.*layers.*gate",
            r"re:model\.layers\.\d+\.x",
            "layers.2",
            "vision_tower.layers.4",
        ],
    }
    for name in ("config.json", "quantize_config.json"):
        found = json.loads((tmp_path / "small" / name).read_text())
        assert found.get("quantization_config", found) == wanted


def test_a_module_that_a_packed_layer_lacks_is_missed(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense", "50GB")
    quantise(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    lost = "model.layers.2.mlp.up_proj."
    save_file({n: t for n, t in load_file(path).items() if not n.startswith(lost)}, path)
    with pytest.raises(SimdiffError, match=f"layer 2 of 0 to 5 must have the tensor '{lost}weight"):
        cut_checkpoint(tmp_path / "dense", plan_for(model))


def test_descriptions_of_layers_in_the_header_are_refused(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense", "50GB")
    path = tmp_path / "dense" / "model.safetensors"
    save_file(load_file(path), path, metadata={"model.layers.0.mlp": '{"_type": "Int4Tensor"}'})
    with pytest.raises(SimdiffError, match="torchao's formats do.*quantise the result"):
        cut_checkpoint(tmp_path / "dense", plan_for(model))


def test_tensors_that_span_layers_need_memory(tmp_path: Path) -> None:
    """Gemma 3n keeps an embedding of every layer side by side in one table."""
    torch.manual_seed(7)
    config = Gemma3nTextConfig(
        **{**ROPE, "intermediate_size": [48] * 6},
        head_dim=8,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 6,
        layer_types=["full_attention"] * 6,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(SurgeryError, match="parts of every layer.*dtype='bfloat16'"):
        cut_checkpoint(tmp_path / "dense", plan_for(model))


TAKEN = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "modeling_tiny.py",
    "helpers/rope.py",
    "LICENSE",
    "additional_chat_templates/rag.jinja",
)
LEFT = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "model.gguf",
    "README.md",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "consolidated.safetensors",
    "original/params.json",
    "global_step7/state.pt",
    "notes.zip",
    ".gitattributes",
)


def test_what_goes_along_and_what_does_not(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense")
    stored = tmp_path / "models--org--tiny" / "blobs"
    stored.mkdir(parents=True)
    for name in (*TAKEN, *LEFT):
        path = tmp_path / "dense" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    linked = stored / "blob"
    (tmp_path / "dense" / "tokenizer.json").rename(linked)
    (tmp_path / "dense" / "tokenizer.json").symlink_to(linked)
    notes = prune(tmp_path / "dense", plan_for(model), tmp_path / "small")
    small = content(tmp_path / "small")
    assert sorted(small) == sorted((*TAKEN, "config.json", "model.safetensors"))
    assert all(small[name] == name.encode() for name in TAKEN)
    assert not (tmp_path / "small" / "tokenizer.json").is_symlink()
    for name in {name.split("/")[0] for name in LEFT}:
        assert any(note.startswith(f"left behind: {name} (") for note in notes), name
    linked.unlink()
    with pytest.raises(SimdiffError, match=r"tokenizer\.json: must be a file, but is a link"):
        prune(tmp_path / "dense", plan_for(model), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def rename_layer(directory: Path, old: str, new: str) -> None:
    path = directory / "model.safetensors"
    save_file({n.replace(old, new): t for n, t in load_file(path).items()}, path)


def spoil(directory: Path, how: str) -> None:
    config = directory / "config.json"
    if how == "no config":
        config.unlink()
    elif how == "config no JSON":
        config.write_text("{")
    elif how == "unknown model":
        edit_json(config, model_type="nonesuch")
    elif how == "no layer count":
        edit_json(config, num_hidden_layers=None)
    elif how == "more layers":
        edit_json(config, num_hidden_layers=7)
    elif how == "hole":
        rename_layer(directory, ".layers.3.", ".layers.9.")
    elif how == "tensor":
        rename_layer(directory, "layers.3.mlp.up_proj", "layers.3.mlp.upp_proj")
    elif how == "shape":
        path = directory / "model.safetensors"
        name = "model.layers.3.mlp.up_proj.weight"
        save_file(load_file(path) | {name: torch.ones(48, 31)}, path)
    else:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("no config", "must hold config.json"),
        ("config no JSON", "config.json: must be JSON"),
        ("unknown model", "config.json: must be the config of a model that stock transformers"),
        ("no layer count", "config.json: must say how many layers"),
        ("more layers", "num_layers 6 against 7"),
        ("hole", r"must have the 6 layers.*model.layers has 0-2, 4-5, 9; layer 3 is missing"),
        ("tensor", "layer 3 of 0 to 5 must have the tensor 'model.layers.3.mlp.up_proj.weight'"),
        ("shape", r"'model.layers.3.mlp.up_proj.weight' must have shape \(48, 32\).*\(48, 31\)"),
        ("truncated", "model.safetensors: truncated: its header says"),
    ],
)
def test_checkpoints_that_cannot_be_cut(how: str, wanted: str, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense", "50GB")
    plan = plan_for(model)
    spoil(tmp_path / "dense", how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SimdiffError, match=wanted) as caught:
        prune(tmp_path / "dense", plan, tmp_path / "small")
    assert str(tmp_path / "dense") in str(caught.value) or how == "more layers"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_fewer_layers_than_its_config(tmp_path: Path) -> None:
    """The plan fits the config, and only the files tell that a layer is not there."""
    model = save_model("llama", tmp_path / "dense", "50GB")
    path = tmp_path / "dense" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if ".layers.5." not in n}, path)
    with pytest.raises(SimdiffError, match=r"model.layers has 0-4; layer 5 is missing"):
        cut_checkpoint(tmp_path / "dense", plan_for(model))


@pytest.mark.parametrize("removed", [(6,), (1, 1), (-1,), (0, 1, 2, 3, 4, 5), ()])
def test_plans_that_are_wrong(removed: tuple[int, ...], tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "dense", "50GB")
    plan_for(model, (1,)).save(tmp_path / "plan.json")
    edit_json(tmp_path / "plan.json", removed=list(removed))
    with pytest.raises(SimdiffError, match="plan.json: must be a complete plan"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(SimdiffError):
        cut_checkpoint(tmp_path / "dense", plan_for(model, removed))


def test_a_plan_for_another_model(tmp_path: Path) -> None:
    other = save_model("gpt2", tmp_path / "other")
    save_model("llama", tmp_path / "dense")
    with pytest.raises(SimdiffError, match="another model, 'tiny': architecture GPT2LMHeadModel"):
        cut_checkpoint(tmp_path / "dense", plan_for(other))


def test_cutting_twice(tmp_path: Path) -> None:
    """A pruned checkpoint is a checkpoint; its plan is replaced."""
    model = save_model("llama", tmp_path / "dense")
    prune(tmp_path / "dense", plan_for(model), tmp_path / "once", "20KB")
    smaller: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "once").eval()
    prune(tmp_path / "once", plan_for(smaller, (0,)), tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "plan.json").read_text())["removed"] == [0]
    shutil.rmtree(tmp_path / "once")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
    with torch.no_grad(), layers_removed(model, (0, *REMOVED)):
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    assert not (tmp_path / "twice" / INDEX).exists()
