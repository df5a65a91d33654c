"""Sub-layers removed: padding, memory, saving, and names that are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.sublayers.structure import SublayerName
from simdiff.sublayers.surgery import remove_sublayers, sublayers_removed
from support.families import OPTIONS, token_ids

REMOVED = (
    SublayerName(0, "attention"),
    SublayerName(2, "mlp"),
    SublayerName(3, "attention"),
    SublayerName(4, "mlp"),
    SublayerName(4, "attention"),
)


def test_padding_on_the_left_with_a_cache(llama: PreTrainedModel) -> None:
    ids = token_ids()[:1, :6]
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    remove_sublayers(llama, REMOVED)
    alone = llama.generate(ids, **OPTIONS)
    together = llama.generate(padded, attention_mask=mask, **OPTIONS)
    assert torch.equal(together[:, 3:], alone)


def test_parameters_are_freed_and_saving_is_refused(llama: PreTrainedModel, tmp_path) -> None:
    layers = llama.model.layers
    before = sum(p.numel() for p in llama.parameters())
    gone = sum(
        p.numel()
        for module in (layers[2].self_attn, layers[2].input_layernorm)
        for p in module.parameters()
    )
    remove_sublayers(llama, [(2, "attention")])
    assert sum(p.numel() for p in llama.parameters()) == before - gone
    with pytest.raises(SimdiffError, match="no config of a checkpoint says that one is missing"):
        llama.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_works_again(llama: PreTrainedModel, tmp_path) -> None:
    with sublayers_removed(llama, [(0, "mlp")]), pytest.raises(SimdiffError):
        llama.save_pretrained(tmp_path / "out")
    llama.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([], "1 to 11 of 12, got 0"),
        ([(layer, kind) for layer in range(6) for kind in ("attention", "mlp")], "got 12"),
        ([(6, "mlp")], "layers 0 to 5.*got mlp 6"),
        ([(1, "norm")], "kinds that they have.*got norm 1"),
        ([(1, "mlp"), (1, "mlp")], "named once each"),
    ],
)
def test_bad_names(llama: PreTrainedModel, names: list, wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted):
        remove_sublayers(llama, names)
