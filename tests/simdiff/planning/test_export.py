"""Exports: what other tools read, checked with their own code where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from simdiff.cli import export
from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import spans
from simdiff.planning.export import FORMATS, export_plan
from simdiff.surgery.layers import layers_removed
from support.plans import ODD_NAMES, plan_for


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
    assert "end of a layer_range is not included" in text
    assert f"# go:   {spans(removed)}" in text


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive_yaml(name: str) -> None:
    content = yaml.safe_load(export_plan(plan_for(6, (1, 4)), "mergekit", name))
    assert [piece["sources"][0]["model"] for piece in content["slices"]] == [name] * 3
    assert set(content) == {"merge_method", "slices"}


def test_the_demo_has_no_name_elsewhere() -> None:
    plan = plan_for(6, (1,))
    plan.model["name"] = "demo"
    with pytest.raises(SimdiffError, match="give model="):
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
    with torch.no_grad(), layers_removed(model, plan.removed):
        assert torch.equal(merged(ids).logits, model(ids).logits)


def test_lists() -> None:
    plan = plan_for(12, (10, 2, 3))
    assert export_plan(plan, "llama.cpp") == "2,3,10\n"
    assert export_plan(plan, "list") == "2\n3\n10\n"
    with pytest.raises(SimdiffError, match="mergekit, llama.cpp, list, got 'gguf'"):
        export_plan(plan, "gguf")
    assert (*FORMATS, export.VLLM) == export.FORMATS  # the last writes a directory
