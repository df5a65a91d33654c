"""A model is the same in every form of its parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

import simdiff
from simdiff.io.json_files import header, write_json
from simdiff.models.identity import check_same_model, model_identity, shapes_of, stored_cut


class Packed(nn.Module):
    """A linear map of 4 bits, two in a byte, packed anew at the first forward."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._dense = weight.detach().clone()
        count = weight.numel() // 2
        self.weight = nn.Parameter(torch.zeros(count, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.weight.dim() == 2:
            self.weight = nn.Parameter(self.weight.detach().flatten(), requires_grad=False)
        return states @ self._dense.T


def pack(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Packed(module.weight))
    model.is_quantized, model.hf_quantizer = True, object()
    return model


def test_packed_parameters_are_those_of_the_stock_model(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    dense = shapes_of(llama, "tiny")
    plan = simdiff.plan(simdiff.score(llama, windows, progress=False), 2, bootstrap=0)
    packed = pack(llama)
    assert model_identity(packed, "tiny") == {**dense, "weights": {}}
    scores = simdiff.score(packed, windows, progress=False)  # packs them anew
    assert scores.model["fingerprint"] == dense["fingerprint"]
    check_same_model(packed, plan.model, "plan")
    assert simdiff.plan(scores, 2, model=packed, windows=windows, bootstrap=0).removed
    llama.is_quantized, llama.hf_quantizer = False, None  # then they are what they are
    assert model_identity(llama, "tiny")["fingerprint"] != dense["fingerprint"]


def test_the_cut_of_a_stored_model(tmp_path: Path) -> None:
    assert stored_cut(tmp_path) == {}
    plan = {"removed": [4, 1], "model": {"fingerprint": "f"}}
    for schema, wanted in (
        ("simdiff.plan", {"removed": [1, 4], "cut_from": "f"}),
        ("simdiff.scores", {}),
    ):
        write_json(tmp_path / "plan.json", {**header(schema), **plan})
        assert stored_cut(str(tmp_path)) == wanted
    (tmp_path / "plan.json").write_text("{")
    assert stored_cut(tmp_path) == {}
