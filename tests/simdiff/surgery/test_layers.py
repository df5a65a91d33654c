"""Pruned models: what stock classes reload, with the same logits, cached or not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from simdiff.checkpoints.from_memory import write_pruned
from simdiff.errors import SimdiffError
from simdiff.models.structure import find_decoder_layers, text_config
from simdiff.planning.criteria import importance
from simdiff.planning.selection import select
from simdiff.scoring.calibration_pass import score
from simdiff.surgery.layers import SurgeryError, layers_removed, remove_layers

REMOVED = (4, 1)
KEPT = (0, 2, 3, 5)
IDS = torch.arange(20).view(2, 10) * 3


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def by_hand(model: PreTrainedModel) -> torch.Tensor:
    """The logits when the removed layers pass their input on: no surgery at all."""
    layers = find_decoder_layers(model).modules
    handles = []
    for layer in REMOVED:

        def skip(module, args, kwargs, output):
            states = args[0] if args else kwargs["hidden_states"]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handles.append(layers[layer].register_forward_hook(skip, with_kwargs=True))
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


def test_cut_equals_skipping_the_layers(tiny: PreTrainedModel) -> None:
    wanted, dense = by_hand(tiny), logits(tiny)
    assert not torch.allclose(wanted, dense)
    assert remove_layers(tiny, REMOVED) is tiny
    assert torch.equal(logits(tiny), wanted)
    assert text_config(tiny).num_hidden_layers == len(find_decoder_layers(tiny)) == 4
    for index, layer in enumerate(find_decoder_layers(tiny).modules):
        for module in layer.modules():
            assert getattr(module, "layer_idx", index) == index


def test_removed_layers_come_back_even_after_an_error(tiny: PreTrainedModel) -> None:
    dense, config = logits(tiny), copy.deepcopy(tiny.config.to_dict())
    with pytest.raises(RuntimeError, match="Tensor with"), layers_removed(tiny, REMOVED):
        logits(tiny).item()
    assert tiny.config.to_dict() == config
    assert torch.equal(logits(tiny), dense)


def test_a_cut_that_stock_classes_cannot_express_is_refused() -> None:
    """Attention is scaled by the layer's index: at another one it would compute something else."""
    model = AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=97, n_embd=32, n_layer=6, n_head=4, scale_attn_by_inverse_layer_idx=True
        )
    ).eval()
    dense = logits(model)
    with pytest.raises(SurgeryError, match="layer 2 attn: scaling"):
        remove_layers(model, (1,))
    assert torch.equal(logits(model), dense)
    assert len(remove_layers(model, (4, 5)).transformer.h) == 4  # nothing moves


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ((), "1 to 5 of 6, got 0"),
        (range(6), "1 to 5 of 6, got 6"),
        ((1, 6), "from 0 to 5, got 6"),
        ((1, 1), "named once each"),
        ((-1,), "from 0 to 5, got -1"),
    ],
)
def test_bad_layers(llama: PreTrainedModel, layers: tuple[int, ...], wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted):
        remove_layers(llama, layers)


def test_plan_for_another_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    scores = score(llama, [IDS], name="first", progress=False)
    plan = select(scores, importance(scores), 2)
    config = LlamaConfig(**{**llama.config.to_dict(), "num_hidden_layers": 8})
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SimdiffError, match="another model, 'first'.*num_layers 6 against 8"):
        write_pruned(other, None, plan, tmp_path)
    assert not list(tmp_path.iterdir())
