"""What does not hold what its own config says is refused before it appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdiff.checkpoints import cut, from_memory
from simdiff.checkpoints.cut import cut_checkpoint, write_cut
from simdiff.checkpoints.from_memory import write_pruned
from simdiff.checkpoints.read_back import Fit, fit, read_back
from simdiff.checkpoints.weight_index import read_weights
from simdiff.errors import SimdiffError
from simdiff.io.outputs import new_directory
from simdiff.models.loading import load_config, meta_model
from simdiff.surgery.config_entries import Depth
from support.checkpoints import CONFIGS, KEPT, edit_json, plan_for, save_model

DEPTH = Depth(6, KEPT)
UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read-back")
    model = save_model("llama", folder / "dense", "50GB")
    (folder / "small").mkdir()
    write_pruned(model, None, plan_for(model), folder / "small")
    return folder / "small"


def check(directory: Path) -> None:
    config = load_config(directory)
    read_back(directory, type(meta_model(config)), type(config), DEPTH)


def change(edit: Callable[[Weights], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        weights = load_file(path)
        edit(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return apply


def config(**entries: object) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", **entries)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (change(lambda w: w.pop(UP)), f"missing: {UP}"),
        (change(lambda w: w.pop("lm_head.weight")), "missing: lm_head.weight"),
        (change(lambda w: w.update(x=torch.ones(2))), "in no model of that config: x"),
        (change(lambda w: w.update({UP: torch.ones(48, 31)})), f"of another shape: {UP}"),
        (
            change(lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)})),
            f"packed, without a quantization_config: {UP}",
        ),
        (
            change(lambda w: w.update({UP: w[UP].to(torch.uint8)})),
            f"packed, without a quantization_config: {UP}",
        ),
        (config(num_hidden_layers=6), "num_hidden_layers is 6"),
        (config(num_hidden_layers=3), "3 layers instead of 4"),
        (config(own_layer_kinds=[1] * 6), "own_layer_kinds still has 6 entries"),
        (config(dtype="bfloat16"), "dtype bfloat16 in the config, but the weights are float32"),
        (config(quantization_config={"quant_method": "fp8"}), "a quantization_config is left"),
        (config(hidden_size=16), "of another shape"),
    ],
)
def test_faults(spoil: Callable[[Path], None], fault: str, small: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(small, tmp_path / "small")
    check(directory)
    spoil(directory)
    with pytest.raises(SimdiffError, match=fault) as caught:
        check(directory)
    assert "nothing was kept" in str(caught.value)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_stock_transformers_saves_fits(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    found = fit(read_weights(tmp_path).tensors, meta_model(load_config(tmp_path)))
    assert found == Fit()


def test_both_ways_of_writing_are_read_back(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written is held back if it is wrong; what was wrong in the source may stay so."""
    model = save_model("llama", tmp_path / "dense", "50GB")
    plan = plan_for(model)
    change(lambda w: w.update(x=torch.ones(2)))(tmp_path / "dense")
    write_cut(cut_checkpoint(tmp_path / "dense", plan), mkdir(tmp_path / "as-the-source"))

    def wrong(entries: dict, source: Path) -> bytes:
        return (small.parent / "dense" / "config.json").read_bytes()

    for module in (cut, from_memory):
        monkeypatch.setattr(module, "config_bytes", wrong)
    with (
        pytest.raises(SimdiffError, match="num_hidden_layers is 6"),
        new_directory(tmp_path / "files") as scratch,
    ):
        write_cut(cut_checkpoint(tmp_path / "dense", plan), scratch)
    with (
        pytest.raises(SimdiffError, match="num_hidden_layers is 6"),
        new_directory(tmp_path / "memory") as scratch,
    ):
        write_pruned(model, None, plan, scratch)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "as-the-source"}


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path
