"""Every family: scored, planned, pruned, reloaded by stock classes, generated, cached or not.

Tiny models with random weights, 6 layers unless said otherwise, of which 1 and 4 go.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from simdiff.checkpoints.from_memory import write_pruned
from simdiff.models.structure import find_decoder_layers, text_config
from simdiff.planning.criteria import importance
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import select
from simdiff.scoring.calibration_pass import score
from simdiff.surgery.layers import layers_removed
from simdiff.surgery.structure import build
from support.families import FAMILIES, OPTIONS, logits, tiny, token_ids

REMOVED = {"recurrent-gemma": (1, 2), "nemotron-h": (0, 4)}


def bypassed(model: PreTrainedModel, removed: tuple[int, ...]) -> torch.Tensor:
    """The dense model's logits when the removed layers pass their input on: no surgery at all."""

    def skip(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers = find_decoder_layers(model).modules
    handles = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in removed]
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


@dataclass
class Pruned:
    """A model, its plan, and what stock classes load from the pruned checkpoint."""

    model: PreTrainedModel
    plan: PruningPlan
    reloaded: PreTrainedModel
    report: dict[str, Any]


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory) -> Pruned:
    model = tiny(request.param)
    removed = REMOVED.get(request.param, (1, 4))
    scores = score(model, [token_ids()], progress=False)
    protect = [layer for layer in range(6) if layer not in removed]
    plan = select(scores, importance(scores), len(removed), protect)
    directory: Path = tmp_path_factory.mktemp(request.param)
    dense = logits(model)
    source = tmp_path_factory.mktemp(f"{request.param}-dense")
    model.save_pretrained(source)
    write_pruned(model, None, plan, directory, source=source)
    assert torch.equal(logits(model), dense), "writing must leave the model as it was"
    reloaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    return Pruned(model, plan, reloaded.eval(), report)


def test_logits_are_those_of_the_kept_layers(pruned: Pruned) -> None:
    """Bit for bit: in memory, reloaded, and in the dense model with the others bypassed."""
    model, removed = pruned.model, pruned.plan.removed
    dense, wanted = logits(model), bypassed(model, removed)
    assert not torch.allclose(wanted, dense)
    with layers_removed(model, removed):
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), dense), "the layers must have come back"
    assert torch.equal(logits(pruned.reloaded), wanted)


def test_stock_reload_is_complete(pruned: Pruned) -> None:
    assert not pruned.report["missing_keys"]
    assert not pruned.report["unexpected_keys"]
    reloaded = pruned.reloaded
    assert len(find_decoder_layers(reloaded)) == len(pruned.plan.kept) == 4
    stock = build(type(reloaded), reloaded.config)
    shapes = {name: p.shape for name, p in stock.named_parameters()}
    assert {name: p.shape for name, p in reloaded.named_parameters()} == shapes
    kinds = getattr(text_config(pruned.model), "layer_types", None)
    if kinds is not None:
        wanted = [kinds[layer] for layer in pruned.plan.kept]
        assert list(text_config(reloaded).layer_types) == wanted


def test_cached_generation_equals_uncached(pruned: Pruned) -> None:
    """20 tokens, where a window has 4; in memory and reloaded."""
    ids = token_ids()[:, :6]
    uncached = pruned.reloaded.generate(ids, use_cache=False, **OPTIONS)
    assert uncached.shape == (2, 20)
    assert torch.equal(pruned.reloaded.generate(ids, use_cache=True, **OPTIONS), uncached)
    with layers_removed(pruned.model, pruned.plan.removed):
        assert torch.equal(pruned.model.generate(ids, use_cache=True, **OPTIONS), uncached)
