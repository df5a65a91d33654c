"""What can be done with a model, and why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from simdiff.jobs.doctor import diagnose
from support.checkpoints import edit_json
from support.commands import simdiff as command
from support.families import tiny
from support.gguf_models import write_gguf


def able(name: object) -> dict[str, bool]:
    return {finding.name: finding.able for finding in diagnose(str(name)).findings}


def test_a_checkpoint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", tiny_checkpoint, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is True
    assert "LlamaForCausalLM, 6 decoder layers at model.layers" in content["what"]
    assert [finding["able"] for finding in content["findings"]] == [True] * 7
    assert content["findings"][-1]["detail"].endswith(", list, vllm (a plan of sub-layers)")
    before = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    assert command("doctor", tiny_checkpoint) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[-1] == f"{tiny_checkpoint} can be scored and cut"
    assert all(line.startswith("yes  ") for line in lines[1:-1])
    assert {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} == before


def test_what_cannot_be_loaded_can_still_be_cut_as_files(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(tiny_checkpoint / "config.json", quantization_config={"quant_method": "modelopt"})
    found = able(tiny_checkpoint)
    assert found["cut as files"]
    assert not found["scored"]
    assert command("doctor", tiny_checkpoint) == 1
    shown = capsys.readouterr().out
    assert "no   loaded: model" in shown
    assert "is quantised as 'modelopt'" in shown
    assert "vllm not: its no-op blocks are those of LlamaForCausalLM, unquantised" in shown
    assert "cannot be scored and cut" in shown


def test_a_model_of_which_only_some_layers_can_go(tiny_checkpoint: Path) -> None:
    size = {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4}
    scaled = GPT2Config(**size, scale_attn_by_inverse_layer_idx=True)
    GPT2LMHeadModel(scaled).save_pretrained(tiny_checkpoint)
    found = {finding.name: finding for finding in diagnose(str(tiny_checkpoint)).findings}
    for name in ("cut as files", "cut in memory"):
        assert found[name].able, found[name]
        assert "without layer 5" in found[name].detail
        assert "; others cannot go alone: " in found[name].detail


def test_of_a_mixture_of_experts_what_lies_around_them_is_repaired(
    tiny_checkpoint: Path,
) -> None:
    tiny("mixtral").save_pretrained(tiny_checkpoint)
    found = {finding.name: finding for finding in diagnose(str(tiny_checkpoint)).findings}
    repair = found["recovered in closed form"]
    assert repair.able
    assert "behind a cut alone, through self_attn.q_proj, self_attn.k_proj" in repair.detail


def test_what_no_command_takes(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = write_gguf(tmp_path / "model.gguf")
    assert command("doctor", gguf) == 1
    shown = capsys.readouterr().out
    assert "a GGUF file, llama, " in shown
    assert "yes  cut as files: with a plan of the model it was made from" in shown
    edit_json(tiny_checkpoint / "config.json", architectures=["LlamaForSequenceClassification"])
    assert command("doctor", tiny_checkpoint) == 1
    assert "head of a classifier" in capsys.readouterr().out
    (tiny_checkpoint / "config.json").unlink()
    (tiny_checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "org/b"}')
    assert command("doctor", tiny_checkpoint) == 1
    assert "is an adapter (of org/b), not a model: merge it" in capsys.readouterr().out
    for name in (tmp_path / "none", tmp_path / "none.gguf"):
        assert command("doctor", name) == 2
        assert f"{name}: no such" in capsys.readouterr().err
