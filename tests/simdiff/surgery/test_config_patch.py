"""Configs written in the words of their source: what a cut does not concern stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from simdiff.models.config import text_part
from simdiff.surgery.config import cut_config, without_mtp
from simdiff.surgery.config_entries import depth_of
from simdiff.surgery.config_patch import patched_config, read_config, set_dtype, stale_counts
from support.families import SHAPE

ROPE = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
KINDS = ["full_attention", "conv", "full_attention", "conv", "conv", "full_attention"]


def cut(name: str, source: dict[str, Any], kept: tuple[int, ...] = (0, 2, 3, 5)) -> dict[str, Any]:
    """The entries after the cut that are not those of the source; None where one is gone."""
    kind = getattr(transformers, name)
    before = read_config(kind, source)
    wanted = cut_config(before, kept).config
    without_mtp(wanted)
    new = patched_config(source, before, wanted, depth_of(before, kept))
    assert stale_counts(new, before, depth_of(before, kept)) == []
    loaded = read_config(kind, new)
    assert text_part(loaded).to_dict() == text_part(wanted).to_dict()
    return {key: new.get(key) for key in {*source, *new} if new.get(key) != source.get(key)}


@pytest.mark.parametrize(
    ("name", "more", "changed"),
    [
        ("LlamaConfig", {**ROPE, "torch_dtype": "float16", "own": [1]}, {}),
        ("LlamaConfig", {"own_layer_bits": [1, 2, 3, 4, 5, 6]}, {"own_layer_bits": [1, 3, 4, 6]}),
        ("Qwen2Config", {"max_window_layers": 3}, {"max_window_layers": 2}),
        ("Qwen3Config", {"mtp_num_hidden_layers": 1}, {"mtp_num_hidden_layers": 0}),
        (
            "Gemma2Config",
            {"sliding_window": 4, "head_dim": 8},
            {"layer_types": [f"{kind}_attention" for kind in ("sliding",) * 2 + ("full",) * 2]},
        ),
        (
            "GraniteMoeHybridConfig",
            {"layer_types": ["mamba", "mamba", "attention"] * 2, "mamba_n_heads": 8},
            {"layer_types": ["mamba", "attention"] * 2},
        ),
        ("Lfm2Config", {"full_attn_idxs": [0, 2, 5]}, {"full_attn_idxs": [0, 1, 3]}),
        ("Lfm2Config", {"layer_types": KINDS}, {"layer_types": [KINDS[i] for i in (0, 2, 3, 5)]}),
    ],
)
def test_entries_that_change(name: str, more: dict, changed: dict) -> None:
    source = {**SHAPE, "transformers_version": "4.51.0", **more}
    found = cut(name, source)
    assert found.pop("num_hidden_layers") == 4
    if name == "Qwen3Config":  # whose default is more than the layers that stay
        found.pop("max_window_layers")
    assert found == changed


def test_words_of_a_class_and_their_aliases() -> None:
    source = {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "num_hidden_layers": 6, "n_head": 4}
    assert cut("GPT2Config", source) == {"n_layer": 4, "num_hidden_layers": 4}


def test_a_number_that_is_repeated_beside_the_decoder() -> None:
    source = {
        "model_type": "llava",
        "num_hidden_layers": 6,
        "text_config": {**SHAPE, "model_type": "llama", **ROPE, "torch_dtype": "float16"},
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 6},
    }
    text = source["text_config"] | {"num_hidden_layers": 4}
    assert cut("LlavaConfig", source) == {"num_hidden_layers": 4, "text_config": text}


def test_a_list_that_the_class_reads_and_drops() -> None:
    """Nemotron-H makes a list of its pattern; transformers 4 and llama.cpp read the pattern."""
    source = {**SHAPE, "hybrid_override_pattern": "M*-M*-"}
    found = cut("NemotronHConfig", source, (1, 2, 3, 5))
    assert found["hybrid_override_pattern"] == "*-M-"
    assert found["num_hidden_layers"] == 4
    assert "layers_block_type" not in found


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
        ({"rope_parameters": {}}, {"rope_parameters": {}, "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"torch_dtype": "float32"}, "vision_config": {}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}, "vision_config": {}},
        ),
    ],
)
def test_dtype(source: dict, wanted: dict) -> None:
    set_dtype(source, "bfloat16")
    assert source == wanted
