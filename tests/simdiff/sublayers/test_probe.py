"""Sub-layers are found in every dtype, or their layer is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from simdiff.errors import SimdiffError
from simdiff.models.structure import find_decoder_layers
from simdiff.sublayers.structure import find_sublayers
from support.families import FAMILIES, PARALLEL, logits, tiny


@pytest.mark.parametrize("family", ["gemma3n", "bloom", "mpt", "longcat-flash"])
def test_layers_built_otherwise_are_refused(family: str) -> None:
    model = tiny(family)
    name = type(find_decoder_layers(model).modules[0]).__name__
    dense = logits(model)
    with pytest.raises(SimdiffError, match=rf"layer \d \({name}\).*neither scored nor removed"):
        find_sublayers(model)
    assert torch.equal(logits(model), dense)


def test_norms_of_the_residual_stream_are_refused() -> None:
    config = OPTConfig(**{**FAMILIES["opt"][1], "do_layer_norm_before": False})
    with pytest.raises(SimdiffError, match=r"layer 0 \(OPTDecoderLayer\)"):
        find_sublayers(AutoModelForCausalLM.from_config(config).eval())


def test_layers_of_a_single_step() -> None:
    names = find_sublayers(tiny("nemotron-h")).names
    assert [name.kind for name in names] == ["attention", "attention", "mlp"] * 2
    assert [name.layer for name in names] == [*range(6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "gpt-neox", "falcon", "lfm2"])
def test_found_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    found = find_sublayers(tiny(family).to(dtype))
    assert [name.kind for name in found.names] == ["attention", "mlp"] * 6
    assert found.layers[0].parallel == (family in PARALLEL)
