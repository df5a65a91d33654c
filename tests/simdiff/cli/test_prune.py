"""The command and the pipeline cut files where there are files, and say what they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.checkpoints import content, plan_for, read_raw
from support.commands import simdiff


@pytest.fixture
def plan(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    plan_for(model, (2, 3)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_prune_copies_files(tiny_checkpoint: Path, plan: Path, tmp_path: Path, capsys) -> None:
    (tiny_checkpoint / "LICENSE").write_text("yours")
    (tiny_checkpoint / "optimizer.pt").write_bytes(b"\0")
    options = ("--plan", plan, "--max-shard-size", "60KB", "-o", tmp_path / "small")
    assert simdiff("prune", tiny_checkpoint, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kept"] == [0, 1, 4, 5]
    assert "left behind: optimizer.pt (state of a training)" in printed["notes"]
    small = content(tmp_path / "small")
    assert small["LICENSE"] == b"yours"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert small[name] == (tiny_checkpoint / name).read_bytes()
    index = json.loads(small["model.safetensors.index.json"])
    assert len(set(index["weight_map"].values())) == sum("-of-" in name for name in small) > 1
    assert simdiff("prune", tiny_checkpoint, *options, "--overwrite") == 0
    assert "Note: left behind: optimizer.pt" in capsys.readouterr().out


def test_another_dtype_takes_the_model_into_memory(
    tiny_checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    assert simdiff("prune", tiny_checkpoint, "--plan", plan, "--dtype", "bfloat16", "-o", out) == 0
    header, _ = read_raw(out / "model.safetensors")
    assert {entry["dtype"] for name, entry in header.items() if name[0] != "_"} == {"BF16"}
    assert len({name.split(".")[2] for name in header if ".layers." in name}) == 4


def test_run_copies_files(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    """What the stock model does not have comes along only where files are copied."""
    (tiny_checkpoint / "LICENSE").write_text("yours")
    text = ("--text", tiny_text, "--num-windows", "4", "--window-length", "16")
    assert simdiff("run", tiny_checkpoint, *text, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model" / "LICENSE").read_text() == "yours"
    removed = json.loads((tmp_path / "out" / "plan.json").read_text())["removed"]
    kept = [layer for layer in range(6) if layer not in removed]
    old = load_file(tiny_checkpoint / "model.safetensors")
    new = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for index, layer in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(new[name.format(index)], old[name.format(layer)])
    assert simdiff("run", tiny_checkpoint, *text, "-o", tiny_checkpoint / "out") == 2


def test_pickles_are_refused_with_the_way_out(
    tiny_checkpoint: Path, plan: Path, tmp_path: Path, capsys
) -> None:
    (tiny_checkpoint / "model.safetensors").rename(tiny_checkpoint / "pytorch_model.bin")
    assert simdiff("prune", tiny_checkpoint, "--plan", plan, "-o", tmp_path / "small") == 2
    message = capsys.readouterr().err
    assert "pytorch_model.bin: pickles are not read, because loading one runs the code" in message
    assert "save_pretrained(NEW)" in message
    assert not (tmp_path / "small").exists()
