"""Cuts of GGUF files that no runtime could read as they were meant: refused, with a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from simdiff.checkpoints.gguf.cut import prune_gguf
from simdiff.errors import SimdiffError
from support.gguf_models import Setup, content, write_gguf
from support.plans import plan_for

PERIODS = [
    # architecture, metadata, a cut that moves the pattern, one that does not
    ("gemma2", {}, (3,), (2, 3)),
    ("gemma3", {"attention.sliding_window": 512}, (1, 2), (11,)),
    ("gpt-oss", {"attention.sliding_window": 128}, (0,), (0, 1, 6, 7)),
    ("cohere2", {"attention.sliding_window": 128}, (4, 5), (4, 5, 6, 7)),
    ("olmo2", {"attention.sliding_window": 128}, (0, 1), (0, 1, 2, 3)),
    ("olmo2", {"attention.sliding_window": 0}, None, (0,)),
    ("gemma2", {"attention.sliding_window_pattern": 3}, (2, 3), (2, 3, 4)),
    ("smollm3", {}, (8,), (8, 9, 10, 11)),
    ("qwen3next", {"full_attention_interval": 3}, (5, 6, 7, 8), (6, 7, 8)),
    ("llama4", {"attention.sliding_window": 0, "interleave_moe_layer_step": 2}, (1,), (1, 2)),
    ("qwen3", {}, None, (0, 5, 6)),
]


@pytest.mark.parametrize(("architecture", "metadata", "bad", "good"), PERIODS)
def test_kinds_told_by_position(
    architecture: str,
    metadata: dict[str, int],
    bad: tuple[int, ...] | None,
    good: tuple[int, ...],
    tmp_path: Path,
) -> None:
    def setup(writer: GGUFWriter, _: str) -> None:
        for key, value in metadata.items():
            writer.add_uint32(f"{architecture}.{key}", value)

    source = write_gguf(tmp_path / "a.gguf", setup, architecture=architecture, num_blocks=12)
    if bad is not None:
        with pytest.raises(SimdiffError, match="by position.*may go in runs of"):
            prune_gguf(source, plan_for(12, bad), tmp_path / "b.gguf")
    prune_gguf(source, plan_for(12, good), tmp_path / "b.gguf")


def test_the_runs_that_a_refusal_proposes_may_go(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", architecture="cohere2", num_blocks=11)
    for first in range(11):
        try:
            prune_gguf(source, plan_for(11, (first,)), tmp_path / "b.gguf", overwrite=True)
        except SimdiffError as error:
            start, end = map(int, re.search(r"such as (\d+)-(\d+)", str(error)).groups())
            run = range(start, end + 1)
            prune_gguf(source, plan_for(11, run), tmp_path / "b.gguf", overwrite=True)


def test_a_stored_pattern_is_cut(tmp_path: Path) -> None:
    pattern = [block % 6 != 5 for block in range(12)]

    def setup(writer: GGUFWriter, _: str) -> None:
        writer.add_sliding_window(512)
        writer.add_sliding_window_pattern(pattern)

    source = write_gguf(tmp_path / "a.gguf", setup, architecture="gemma3", num_blocks=12)
    cut = prune_gguf(source, plan_for(12, (1, 2, 8)), tmp_path / "b.gguf").output
    kept = [block for block in range(12) if block not in (1, 2, 8)]
    assert content(cut)["gemma3.attention.sliding_window_pattern"][1] == [
        pattern[block] for block in kept
    ]


def scale_of_27b(writer: GGUFWriter, _: str) -> None:
    writer.add_head_count(2)
    writer.add_key_length(64)


DEPTHS = [
    ("gemma2", 46, scale_of_27b, (0, 1), "attention scale.*sqrt.128. at 46, but 1/sqrt.64. at 44"),
    ("gemma2", 48, scale_of_27b, (0, 1), "attention scale.*sqrt.64. at 48, but 1/sqrt.128. at 46"),
    ("deepseek2", 27, None, (4,), None),
    ("deepseek2", 27, None, (4, 5), "rank of the queries.*full at 27, but low at 25"),
    ("deepseek2", 28, None, (4,), "rank of the queries.*low at 28, but full at 27"),
    ("minicpm", 40, None, (4,), "residual scale of minicpm"),
    ("minicpm", 40, lambda w, a: w.add_residual_scale(0.2), (4,), None),
    ("exaone4", 64, None, (60, 61, 62, 63), "sliding window of exaone4"),
]


@pytest.mark.parametrize(("architecture", "depth", "setup", "removed", "refusal"), DEPTHS)
def test_what_a_runtime_takes_from_the_depth(
    architecture: str,
    depth: int,
    setup: Setup | None,
    removed: tuple[int, ...],
    refusal: str | None,
    tmp_path: Path,
) -> None:
    def with_gate(writer: GGUFWriter, name: str) -> None:
        if name == "deepseek2":
            writer.add_uint32(f"{name}.expert_gating_func", 1)
        if setup is not None:
            setup(writer, name)

    source = write_gguf(tmp_path / "a.gguf", with_gate, architecture=architecture, num_blocks=depth)
    if refusal is None:
        prune_gguf(source, plan_for(depth, removed), tmp_path / "b.gguf")
        return
    with pytest.raises(SimdiffError, match=refusal):
        prune_gguf(source, plan_for(depth, removed), tmp_path / "b.gguf")


def u32(key: str, value: int) -> Setup:
    return lambda writer, architecture: writer.add_uint32(f"{architecture}.{key}", value)


ODD_FIRST = {0: {"attn_v0.weight": GGMLQuantizationType.F16}}

REFUSALS: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    ({"architecture": "baichuan"}, (1,), "'baichuan' cannot be cut"),
    ({"architecture": "t5"}, (1,), "it has an encoder"),
    ({"architecture": "clip"}, (1,), "not a language model"),
    ({"architecture": "martian"}, (1,), "does not know it; upgrade gguf"),
    ({"setup": u32("attention.shared_kv_layers", 2)}, (1,), "keys and values of earlier"),
    ({"setup": u32("rescale_every_n_layers", 2)}, (1,), "halves the hidden states"),
    ({"setup": u32("n_deepstack_layers", 3)}, (2,), "protect layers 0-2"),
    ({"setup": u32("hash_layer_count", 3)}, (2,), "meaning is unknown here"),
    ({"setup": lambda w, a: w.add_array(f"{a}.hot_blocks", [1, 4])}, (2,), "array of 2 for 6"),
    ({"setup": lambda w, _: w.add_type("adapter")}, (2,), "general.type 'adapter'"),
    ({"extra": ["per_layer_token_embd.weight"]}, (2,), "a slice for every layer"),
    ({"extra": ["v.blk.0.attn_q.weight"]}, (2,), "a decoder alone"),
    ({"extra": ["blk.6.attn_q.weight"]}, (2,), "layer 6 is beyond them"),
    ({"tensors": lambda b: ODD_FIRST.get(b, {})}, (0,), "protect layer 0"),
    ({"setup": u32("nextn_predict_layers", 6)}, (2,), "must be below the 6 layers"),
    ({"setup": u32("nextn_predict_layers", 1)}, (2,), "num_layers 6 against 5"),
]


@pytest.mark.parametrize(("options", "removed", "wanted"), REFUSALS)
def test_refusals(
    options: dict[str, Any], removed: tuple[int, ...], wanted: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "a.gguf", **options)
    with pytest.raises(SimdiffError, match=wanted):
        prune_gguf(source, plan_for(6, removed), tmp_path / "b.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("model", "num_layers", "wanted"),
    [
        ({"hidden_size": 512}, 6, "another model, 'tiny': hidden_size 512 against 256"),
        ({"architecture": "Qwen2ForCausalLM"}, 6, "Qwen2ForCausalLM against llama"),
        ({"architecture": "GPT2LMHeadModel"}, 6, "GPT2LMHeadModel against llama"),
        ({}, 8, "num_layers 8 against 6"),
        ({"architecture": "MistralForCausalLM", "hidden_size": 256}, 6, None),
    ],
)
def test_plan_for_another_model(
    model: dict[str, Any], num_layers: int, wanted: str | None, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "a.gguf")
    plan = plan_for(num_layers, (1,), **model)
    if wanted is None:
        prune_gguf(source, plan, tmp_path / "b.gguf")
        return
    with pytest.raises(SimdiffError, match=wanted):
        prune_gguf(source, plan, tmp_path / "b.gguf")
