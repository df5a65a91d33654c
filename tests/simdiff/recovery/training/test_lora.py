"""Adapters: where they go, and that merged they compute the same."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.lora import Adapters, LoraOptions, target_modules
from support.tiny_models import make_tiny
from support.training import trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_logits_are_those_with_adapters(family: str, dtype: str) -> None:
    model = make_tiny(family).to(getattr(torch, dtype))
    adapters = Adapters(model, LoraOptions(rank=4, alpha=6.0))
    with torch.no_grad():
        for parameter in adapters.parameters().values():
            assert parameter.dtype == torch.float32
            parameter.normal_(std=0.2)
    exact = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = module.get_base_layer().weight.detach().double()
            sums = [1.5 * (y @ x) for x, y in ((a.double(), b.double()), (a.abs(), b.abs()))]
            change, size = (s.detach().T if family == "gpt2" else s.detach() for s in sums)
            exact[name] = weight + change, weight.abs() + size
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
        merged = adapters.merge()
        found = merged(input_ids=ids).logits.float()
    rounding = torch.finfo(getattr(torch, dtype)).eps
    assert float((found - wanted).abs().max()) <= 40 * rounding * float(wanted.abs().max())
    for name, (value, size) in exact.items():
        # 7 roundings of a float32 sum (4 products, their sum, the scale, the weight), then one to
        # the stored dtype: added in 16 bits, there would be two of those.
        allowed = 7 * 2**-24 * size + 0.5 * rounding * value.abs()
        stored = merged.get_submodule(name).weight.double()
        assert bool(((stored - value).abs() <= allowed * 1.001 + 2**-25).all()), name
    assert merged.dtype == getattr(torch, dtype)


def test_targets() -> None:
    model = make_tiny("llama")
    assert len(target_modules(model)) == 6 * 7
    assert {name.rpartition(".")[2] for name in target_modules(model, ("q_proj", "up_proj"))} == {
        "q_proj",
        "up_proj",
    }
    with pytest.raises(SimdiffError, match="q_proj, k_proj.* got x_proj"):
        target_modules(model, ("q_proj", "x_proj"))


def test_peft_is_needed(
    dense: PreTrainedModel, text: tuple[Examples, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SimdiffError, match=r"package peft .*pip install 'simdiff-kernels\[recover"):
        trained(dense, text)
