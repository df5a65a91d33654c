"""`simdiff verify`: what is whole passes, and each way to break it is found by its own check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from simdiff import cli
from simdiff.checkpoints.from_memory import write_pruned
from simdiff.errors import SimdiffError
from simdiff.models.identity import model_identity
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.verify import Check, verify
from support.plans import plan_for

WEIGHTS = "model.safetensors"


def plan_of(model: PreTrainedModel) -> PruningPlan:
    return plan_for(6, (4, 1), **model_identity(model, "tiny"))


def pruned(source: Path, model: PreTrainedModel, target: Path) -> Path:
    """The model takes the place of the one in `source`, beside the tokenizer there."""
    model.save_pretrained(source)
    target.mkdir()
    write_pruned(model, AutoTokenizer.from_pretrained(source), plan_of(model), target)
    return target


@pytest.fixture
def checkpoint(llama: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return pruned(tiny_checkpoint, llama, tmp_path / "small")


def faults(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if check.passed is False}


def test_whole(family: str, tiny: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    # The stock classes of some families add tokens, or name special ones of the full vocabulary.
    tiny.resize_token_embeddings(104)
    tiny.generation_config = GenerationConfig(eos_token_id=96)
    directory = pruned(tiny_checkpoint, tiny, tmp_path / "small")
    checks = verify(directory, str(tiny_checkpoint))
    # Qwen2's own tokenizer class finds nothing in a vocabulary of whole words.
    assert list(faults(checks)) == (["tokenizer"] if family == "qwen2" else [])
    assert [check.name for check in checks if check.passed is None] == []
    details = {check.name: check.detail for check in checks}
    assert details["layers"].startswith("4 decoder layers at ")
    assert details["equals the plan applied to the original"].endswith("exactly")
    if family == "qwen2":
        assert "past the sliding window of 4" in details["cached generation"]
    assert len(verify(directory)) == len(checks) - 1


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def swap(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        other = name.replace(".layers.1.", ".layers.2.")
        weights[name], weights[other] = weights[other], weights[name]


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan


def truncate(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def edit_plan(directory: Path, **changes: object) -> None:
    path = directory / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN: list[tuple[str, Callable[[Path], object], dict[str, str]]] = [
    (
        "one layer more than there is",
        lambda d: edit_config(d, num_hidden_layers=5),
        {
            "weights against config": "9 not in the files, so filled with random numbers: "
            "model.layers.4.",
            "plan against config": "4 layers (6 less 2) against 5",
        },
    ),
    (
        "one layer fewer",
        lambda d: edit_config(d, num_hidden_layers=3),
        {
            "weights against config": "9 in the files, but not in the model of this config",
            "plan against config": "4 layers (6 less 2) against 3",
        },
    ),
    (
        "a tensor is missing",
        lambda d: edit_weights(d, lambda w: w.pop("model.layers.3.mlp.down_proj.weight")),
        {"weights against config": "1 not in the files"},
    ),
    (
        "a tensor of another shape",
        lambda d: edit_config(d, intermediate_size=40),
        {"weights against config": "model.layers.0.mlp.down_proj.weight, "},
    ),
    (
        "NaN",
        lambda d: edit_weights(d, poison),
        {
            "finite": "NaN or Inf in 1 parameters, first in model.layers.2.mlp.up_proj.weight",
            "cached generation": "differ by nan",
        },
    ),
    ("truncated", truncate, {"loads with stock classes": "is damaged or not whole"}),
    (
        "no weights",
        lambda d: (d / WEIGHTS).unlink(),
        {"loads with stock classes": "must hold weights"},
    ),
    (
        "layer_types as before",
        lambda d: edit_config(d, layer_types=["full_attention"] * 6),
        {},  # which check fails first is transformers' choice
    ),
    (
        "a list of one entry per layer as before",
        lambda d: edit_config(d, scale_by_layer=[1.0] * 6),
        {"layers": "4 decoder layers, but scale_by_layer has 6 entries"},
    ),
    (
        "code of its own",
        lambda d: edit_config(d, auto_map={"AutoModelForCausalLM": "mine.Model"}),
        {"config": "auto_map"},
    ),
    (
        "no tokenizer",
        lambda d: [path.unlink() for path in d.glob("tokenizer*")],
        {"tokenizer": ""},
    ),
    (
        "a tokenizer of a larger vocabulary",
        lambda d: (d / "tokenizer.json").write_text(
            (d / "tokenizer.json").read_text().replace('"w96": 96', '"w96": 97')
        ),
        {"tokenizer": "token id 97 has no row in the embedding of 97"},
    ),
    (
        "generation config of another model",
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [3, 128009]}'),
        {"generation config": "eos_token_id 128009 has no row in the embedding of 97"},
    ),
    (
        "plan of another cut",
        lambda d: edit_plan(d, removed=[1], kept=[0, 2, 3, 4, 5]),
        {"plan against config": "5 layers (6 less 1) against 4"},
    ),
    (
        "plan of another model",
        lambda d: edit_plan(d, model={"hidden_size": 64, "architecture": "GemmaForCausalLM"}),
        {"plan against config": "hidden_size 64 against 32; architecture Gemma"},
    ),
    ("damaged plan", lambda d: (d / "plan.json").write_text("{"), {"plan against config": "JSON"}),
    (
        "damaged config",
        lambda d: (d / "config.json").write_text("{"),
        {"config": "not JSON", "tokenizer": "not a valid JSON file"},
    ),
]


@pytest.mark.parametrize(("how", "wanted"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken(how: Callable[[Path], object], wanted: dict[str, str], checkpoint: Path) -> None:
    how(checkpoint)
    checks = verify(checkpoint)
    found = faults(checks)
    if wanted:
        assert set(found) == set(wanted), found
    assert found
    for name, words in wanted.items():
        assert words in found[name], found
    assert len(checks) == 9, "every check is reported, whatever fails"
    assert all("\n" not in check.line() for check in checks)


@pytest.mark.parametrize("change", [swap, poison])
def test_only_the_original_tells_that_layers_are_swapped(
    change: Callable[[dict[str, torch.Tensor]], None], checkpoint: Path, tiny_checkpoint: Path
) -> None:
    edit_weights(checkpoint, change)
    if change is swap:
        assert faults(verify(checkpoint)) == {}
    found = faults(verify(checkpoint, str(tiny_checkpoint)))
    assert "parameters differ" in found["equals the plan applied to the original"]


def test_another_cut_of_the_same_size_differs(checkpoint: Path, tiny_checkpoint: Path) -> None:
    edit_plan(checkpoint, removed=[1, 2], kept=[0, 3, 4, 5])
    assert faults(verify(checkpoint)) == {}
    found = faults(verify(checkpoint, str(tiny_checkpoint)))
    assert set(found) == {"equals the plan applied to the original"}


def test_a_cache_that_counts_wrongly_is_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def shifted(self, *args, **kwargs):
        if kwargs.get("past_key_values") is not None and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] * 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", shifted)
    assert "cached generation" in faults(verify(checkpoint))


def test_the_command(
    checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(checkpoint), "--against", str(tiny_checkpoint)]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("ok    ") for line in lines[:10])
    assert lines[10].endswith("10 of 10 checks held, 0 failed")
    edit_weights(checkpoint, swap)
    assert cli.main([*command, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is False
    assert [check["passed"] for check in content["checks"]] == [True] * 9 + [False]
    for wrong, words in (
        ([str(tmp_path / "none")], "none: No such file or directory"),
        ([str(checkpoint / WEIGHTS)], "a directory with a model, got a file"),
        ([str(tmp_path)], "no config.json"),
        ([str(checkpoint), "--against", str(tmp_path / "none")], "none: no such directory"),
    ):
        assert cli.main(["verify", *wrong]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SimdiffError):
        verify(tmp_path)


def test_a_checkpoint_that_simdiff_did_not_write(tiny_checkpoint: Path) -> None:
    checks = verify(tiny_checkpoint)
    assert faults(checks) == {}
    assert [check.name for check in checks if check.passed is None] == ["plan against config"]
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
