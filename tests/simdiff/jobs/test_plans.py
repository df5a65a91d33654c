"""Plans as users give them: of layers alone, and of a sibling of the model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import simdiff
from simdiff.checkpoints.gguf.cut import gguf_depth
from simdiff.errors import SimdiffError
from simdiff.jobs.plans import fitted, plan_for
from simdiff.models.identity import check_same_model, model_identity, shapes_of
from simdiff.models.weights import stored_weights
from simdiff.planning.plan import PruningPlan
from support.checkpoints import content
from support.checkpoints import plan_for as chosen_plan
from support.commands import simdiff as command
from support.gguf_models import write_gguf
from support.tiny_models import tiny_config


def llama(**changes: object) -> PreTrainedModel:
    config = tiny_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config)


def test_a_plan_serves_a_sibling(capsys: pytest.CaptureFixture[str]) -> None:
    """Another vocabulary is no matter; another depth or shape is."""
    base = llama()
    plan = chosen_plan(base, (2, 3))
    assert fitted(plan, base, "base") is plan
    sibling = llama(vocab_size=113)
    found = fitted(plan, sibling, "sibling")
    check_same_model(sibling, found.model, "plan")
    assert found.removed == plan.removed
    assert found.model == model_identity(sibling, "sibling")
    assert found.notes[-1].startswith("the plan was made for ")
    assert "same shapes as those of sibling" in found.notes[-1]
    told = " ".join(capsys.readouterr().err.split())
    assert told == f"Note: {found.notes[-1]}"
    older = {key: value for key, value in plan.model.items() if key != "layers_fingerprint"}
    assert fitted(PruningPlan(**{**vars(plan), "model": older}), sibling, "s").model["name"] == "s"
    # The third has as many parameters in every layer: q, k, v of 32, 16, 16 rows, or 24, 24, 24.
    for changes in (
        {"num_hidden_layers": 5},
        {"intermediate_size": 56},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12},
        {"hidden_size": 16},
    ):
        other = llama(**changes)
        same = fitted(plan, other, "other")
        assert same is plan
        with pytest.raises(SimdiffError, match="made for another model"):
            check_same_model(other, same.model, "plan")


def test_a_plan_serves_a_fine_tuned_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan that lies beside the cut model then tells that model's weights."""
    base = llama()
    plan = chosen_plan(base, (2, 3))
    tuned = copy.deepcopy(base)
    tuned.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(1.1)
    found = fitted(plan, tuned, "tuned")
    assert found.model == model_identity(tuned, "tuned") != plan.model
    assert "whose weights differ from those of tuned" in found.notes[-1]
    assert "whose weights differ" in " ".join(capsys.readouterr().err.split())
    with torch.device("meta"):
        stock = llama()
    known = plan.model["weights"]
    assert fitted(plan, stock, "base", known) is plan
    older = replace(plan, model={**plan.model, "weights": {}})
    assert fitted(older, stock, "base", known) == plan


def test_layers_alone_in_python(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A list, a plan of a list, in memory and into files: what the plan of these layers gives."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    chosen_plan(model, (2, 3)).save(tmp_path / "plan.json")
    wanted = content(simdiff.prune(tiny_checkpoint, tmp_path / "plan.json", tmp_path / "wanted"))
    for name, plan in (("list", [2, 3]), ("plan", PruningPlan((2, 3)))):
        found = content(simdiff.prune(tiny_checkpoint, plan, tmp_path / name))
        assert found["model.safetensors"] == wanted["model.safetensors"]
        assert found["config.json"] == wanted["config.json"]
        stored = PruningPlan.load(tmp_path / name / "plan.json")
        weights = stored_weights(tiny_checkpoint)
        assert stored.model == {**shapes_of(model, str(tiny_checkpoint)), "weights": weights}
        assert "Chosen by hand" in found["README.md"].decode()
        assert f"simdiff prune {tiny_checkpoint} --remove 2,3" in found["README.md"].decode()
        assert "importance" not in found["README.md"].decode()
    assert simdiff.prune(model, [2, 3]).config.num_hidden_layers == 4
    with pytest.raises(SimdiffError, match="from 0 to 5, got 6"):
        plan_for(str(tiny_checkpoint), [6])


def test_layers_alone_in_every_command(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ("--text", tiny_text, "--num-windows", 4, "--window-length", 16)
    small, repaired = tmp_path / "small", tmp_path / "repaired"
    assert command("prune", tiny_checkpoint, "--remove", "2-3", "-o", small) == 0
    listed = tmp_path / "list.txt"
    assert command("export", small / "plan.json", "--format", "list", "-o", listed) == 0
    assert command("verify", small, "--against", tiny_checkpoint) == 0
    assert command("recover", tiny_checkpoint, "--plan", listed, *text, "-o", repaired) == 0
    assert json.loads((repaired / "plan.json").read_text())["removed"] == [2, 3]
    capsys.readouterr()
    assert command("eval", tiny_checkpoint, "--remove", "3,2", *text, "--json") == 0
    by_hand = json.loads(capsys.readouterr().out)
    assert by_hand["removed"] == ["3", "2"]
    assert command("eval", tiny_checkpoint, small, *text, "--json") == 0
    files = json.loads(capsys.readouterr().out)["models"]
    name = f"{tiny_checkpoint}, without layers 2-3"
    assert by_hand["models"][name]["perplexity"] == files[str(small)]["perplexity"]
    assert command("report", small, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "named by hand" in page
    assert "Criterion" not in page
    out = ("-o", tmp_path / "none")
    for words, wanted in (
        (("prune", tiny_checkpoint, *out), "--plan (a plan.json, or a list of layers) or --remove"),
        (("prune", tiny_checkpoint, "--remove", "6", *out), "from 0 to 5, got 6"),
        (("recover", tiny_checkpoint, "--remove", "0-5", *text, *out), "1 to 5 layers of 6"),
        (("eval", tiny_checkpoint, "--remove", "9", *text), "from 0 to 5, got 9"),
        (("bench", tiny_checkpoint, "--remove", "9"), "from 0 to 5, got 9"),
        (("bench", tiny_checkpoint, "--plan", tmp_path / "no.json"), "no.json"),
    ):
        assert command(*words) == 2, words
        told = capsys.readouterr().err
        assert wanted in told, (words, told)
        assert "load " + str(tiny_checkpoint) not in told  # before the weights are read
    with pytest.raises(SystemExit):
        command("prune", tiny_checkpoint, "--plan", listed, "--remove", "2", *out)
    assert "not allowed with argument" in capsys.readouterr().err


def test_layers_alone_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    assert gguf_depth(source) == 6
    assert command("prune", source, "--remove", "2,3", "-o", tmp_path / "small.gguf") == 0
    assert gguf_depth(tmp_path / "small.gguf") == 4
    assert command("prune", source, "--remove", "6", "-o", tmp_path / "none.gguf") == 2
    assert "from 0 to 5, got 6" in capsys.readouterr().err
