"""Hooks for serving engines on stand-ins that call their layers as the engines do.

The engines are not installed here. The stand-ins have the calling convention of their public
sources: layers take and return hidden states and a residual and write over both, all tokens are
in one row, and SGLang attaches one hook to all modules whose names match its patterns.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import simdiff
from simdiff import engines
from simdiff.errors import SimdiffError
from simdiff.scoring.calibration_pass import score
from simdiff_kernels import METRICS

HOOKS = {
    "target_modules": ["model.layers.[0-9]", "model.layers.[0-9][0-9]", "model.norm"],
    "hook_type": "forward_pre",
    "with_kwargs": True,
    "hook_factory": "simdiff.engines:sglang",
}


class Norm(nn.Module):
    """Adds the residual and writes the sum over it, as a fused kernel does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self.inner(x)
        residual += x
        x.copy_(self.inner(residual))
        return x, residual


class Layer(nn.Module):
    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.before, self.after = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.attention, self.mlp, self.rotary = layer.self_attn, layer.mlp, rotary

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: object,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden_states = hidden_states, self.before(hidden_states)
        else:
            hidden_states, residual = self.before(hidden_states, residual)
        angles = self.rotary(hidden_states[None], positions[None])
        hidden_states = self.attention(hidden_states[None], position_embeddings=angles)[0][0]
        hidden_states, residual = self.after(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Body(nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens
        self.layers = nn.ModuleList(
            Layer(layer, model.model.rotary_emb) for layer in model.model.layers
        )
        self.norm = Norm(model.model.norm)

    def forward(self, ids: Tensor, keywords: bool) -> Tensor:
        positions, residual = torch.arange(len(ids)), None
        states = self.embed_tokens(ids)
        for layer in self.layers:
            if keywords:
                states, residual = layer(
                    positions=positions,
                    hidden_states=states,
                    forward_batch=None,
                    residual=residual,
                )
            else:
                states, residual = layer(positions, states, None, residual)
        return self.norm(states, residual)[0]


class Engine(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = Body(model)

    @torch.no_grad()
    def forward(self, ids: Tensor, keywords: bool = False) -> Tensor:
        return self.model(ids, keywords)


def attach(model: nn.Module, specs: list[dict[str, Any]]) -> None:
    """As SGLang does: one hook for all modules whose names match."""
    for spec in specs:
        room, name = spec["hook_factory"].split(":")
        hook = getattr(importlib.import_module(room), name)(spec["config"])
        for path, module in model.named_modules():
            if any(fnmatch.fnmatch(path, pattern) for pattern in spec["target_modules"]):
                module.register_forward_pre_hook(hook, with_kwargs=spec["with_kwargs"])


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 97, (length,), generator=generator) for length in (9, 30)]


def check(found: simdiff.LayerScores, model: PreTrainedModel) -> None:
    """The scores of hooks on the stock model; the residual is summed in another order there."""
    wanted = score(model, [ids[None] for ids in batches()], progress=False)
    assert found.num_tokens == wanted.num_tokens == 39
    for name in METRICS:
        assert found.metrics[name].mean == pytest.approx(wanted.metrics[name].mean, rel=2e-5)
        assert found.metrics[name].maximum == pytest.approx(wanted.metrics[name].maximum, rel=2e-5)
    places = [(place.sequence, place.position) for place in wanted.metrics[METRICS[0]].location]
    assert [(p.sequence, p.position) for p in found.metrics[METRICS[0]].location] == places
    assert found.blocks is not None
    assert wanted.blocks is not None
    for name, matrix in wanted.blocks.metrics.items():
        for row, (mine, theirs) in enumerate(zip(found.blocks.metrics[name], matrix, strict=True)):
            assert mine == pytest.approx(theirs, rel=2e-5), (name, row)
    assert found.sequences is None
    assert found.last_token_angles is None


def test_sglang(llama: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine, output = Engine(llama), tmp_path / "scores.json"
    config = {"model": str(tiny_checkpoint), "output": str(output)}
    attach(engine, json.loads(json.dumps([{**HOOKS, "config": config}])))
    first, second = batches()
    engine(first)
    assert simdiff.LayerScores.load(output).num_tokens == len(first)
    handle = engine.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(AssertionError):  # a forward that ends in a layer is forgotten
        engine(second)
    handle.remove()
    engine(second)
    found = simdiff.LayerScores.load(output)
    check(found, llama)
    plan = simdiff.plan(found, num_layers=2)
    assert len(plan.removed) == 2
    assert any("no bootstrap" in note for note in plan.notes)


def fail(*_: object) -> None:
    raise AssertionError


def test_vllm(llama: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = Engine(llama)

    def apply_model(function: Any) -> list[Any]:
        return [function(engine)]

    with pytest.raises(SimdiffError, match="vllm_hooks must have been applied"):
        apply_model(engines.vllm_scores)
    apply_model(functools.partial(engines.vllm_hooks, name=str(tiny_checkpoint)))
    with pytest.raises(SimdiffError, match="no forward has passed"):
        apply_model(engines.vllm_scores)
    for ids in batches():
        engine(ids, keywords=True)
    (content,) = apply_model(engines.vllm_scores)
    (tmp_path / "scores.json").write_text(json.dumps(content))
    check(simdiff.LayerScores.load(tmp_path / "scores.json"), llama)


def test_refusals(llama: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SimdiffError, match="config must hold model and output"):
        engines.sglang({"model": str(tiny_checkpoint)})
    engine = Engine(llama)
    config = {"model": str(tiny_checkpoint), "output": str(tmp_path / "{rank}.json")}
    attach(engine, [{**HOOKS, "target_modules": ["model.layers.*"], "config": config}])
    with pytest.raises(SimdiffError, match="hooks belong on whole layers"):
        engine(batches()[0])
    engine = Engine(llama)
    del engine.model.layers[-1]
    with pytest.raises(SimdiffError, match="must have 6 modules named layers"):
        engines.vllm_hooks(engine, str(tiny_checkpoint))
    scores = engines.EngineScores(str(tiny_checkpoint))
    with pytest.raises(SimdiffError, match=r"must take hidden states \(tokens, 32\)"):
        scores.before(Norm(nn.Identity()), (torch.ones(3, 31),), {})
    with pytest.raises(SimdiffError, match="must take hidden states, and a residual of their"):
        engines.EngineScores(str(tiny_checkpoint)).before(Norm(nn.Identity()), (None,), {})
