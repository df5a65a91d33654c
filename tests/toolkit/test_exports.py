"""Exports: what other tools read, checked with their own code where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from plans import plan_for
from transformers import AutoModelForCausalLM

from simdiff import cli
from simdiff.cli import export
from simdiff.errors import SimdiffError
from simdiff.exports import FORMATS, export_plan, layer_runs, run_words
from simdiff.surgery import removed_layers

ODD_NAMES = [
    "org/model-7B",
    'a "quoted": {name}, # not a comment',
    "line\nbreak: [0, 1]\n- x",
    "../modèle/日本 😀 \\ \t\x07\x7f\u2028\x85",
    "- yes",
    "null",
    "org/name@main",
]


def test_runs_are_half_open() -> None:
    assert layer_runs([5, 0, 1, 2, 7, 8]) == [(0, 3), (5, 6), (7, 9)]
    assert layer_runs([]) == []
    assert run_words([1, 2, 9]) == "[1, 3), [9, 10)"


@pytest.mark.parametrize("removed", [(4, 1), (0,), (5,), (1, 2, 3), (0, 5)])
def test_mergekit_structure(removed: tuple[int, ...]) -> None:
    plan = plan_for(6, removed)
    text = export_plan(plan, "mergekit", "org/model")
    content = yaml.safe_load(text)
    assert content["merge_method"] == "passthrough"
    assert set(content) == {"merge_method", "slices"}
    layers = []
    for piece in content["slices"]:
        assert set(piece) == {"sources"}
        (source,) = piece["sources"]
        assert source["model"] == "org/model"
        start, end = source["layer_range"]
        layers += range(start, end)
    assert tuple(layers) == plan.kept
    assert "end not included" in text
    assert f"# go:   {run_words(removed)}" in text


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive_yaml(name: str) -> None:
    content = yaml.safe_load(export_plan(plan_for(6, (1, 4)), "mergekit", name))
    assert [piece["sources"][0]["model"] for piece in content["slices"]] == [name] * 3
    assert set(content) == {"merge_method", "slices"}


def test_the_demo_has_no_name_elsewhere() -> None:
    plan = plan_for(6, (1,))
    plan.model["name"] = "demo"
    with pytest.raises(SimdiffError, match="give --model"):
        export_plan(plan, "mergekit")
    assert export_plan(plan, "llama.cpp") == "1\n"


@pytest.mark.parametrize("name", ["tiny", "tiny+@2"])
def test_mergekit_makes_the_model_of_the_plan(
    name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mergekit", reason="run by mergekit itself where it is installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    source = tiny_checkpoint.rename(tmp_path / name)
    plan = plan_for(6, (4, 1))
    text = export_plan(plan, "mergekit", str(source))
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(text)),
        str(tmp_path / "merged"),
        MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.arange(20).view(2, 10) * 3
    with torch.no_grad(), removed_layers(model, plan.removed):
        assert torch.equal(merged(ids).logits, model(ids).logits)


def test_lists() -> None:
    plan = plan_for(12, (10, 2, 3))
    assert export_plan(plan, "llama.cpp") == "2,3,10\n"
    assert export_plan(plan, "list") == "2\n3\n10\n"
    with pytest.raises(SimdiffError, match="mergekit, llama.cpp, list, got 'gguf'"):
        export_plan(plan, "gguf")
    assert tuple(FORMATS) == export.FORMATS


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.txt"
    plan_for(6, (4, 1)).save(plan)
    assert cli.main(["export", str(plan), "--format", "llama.cpp"]) == 0
    assert capsys.readouterr().out == "1,4\n"
    assert cli.main(["export", str(plan), "--format", "list", "-o", str(out)]) == 0
    assert out.read_text() == "1\n4\n"
    capsys.readouterr()
    assert cli.main(["export", str(plan), "--format", "list", "-o", str(out)]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert cli.main(["export", str(plan), "--format", "mergekit", "--model", "a/b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["kept_runs"] == [[0, 1], [2, 4], [5, 6]]
    assert yaml.safe_load(content["text"])["slices"][1]["sources"][0]["layer_range"] == [2, 4]
    plan.write_text("{}")
    assert cli.main(["export", str(plan), "--format", "list"]) == 2
