"""Cut configs: what becomes of each kind of per-layer entry; what is refused, with what advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from simdiff.errors import SimdiffError
from simdiff.models.config import text_part
from simdiff.models.structure import find_decoder_layers
from simdiff.surgery.config import check_cut, cut_config, stock_class
from simdiff.surgery.config_entries import cut_entries, depth_of
from simdiff.surgery.layers import SurgeryError, layers_removed, remove_layers

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}
JAMBA = {
    **SHAPE,
    "num_hidden_layers": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 3,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
BAMBA = {**SHAPE, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
GEMMA3N = {
    **SHAPE,
    "head_dim": 8,
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

# class, entries of the dense config, layers that stay, entries of the cut config
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    ("LlamaConfig", {}, (0, 2, 5), {"num_hidden_layers": 3}),
    ("GPT2Config", {"n_embd": 32, "n_layer": 6, "n_head": 4}, (0, 5), {"n_layer": 2}),
    ("BloomConfig", {"n_head": 4, "n_layer": 6}, (1, 5), {"n_layer": 2}),
    (
        "Gemma3TextConfig",
        {"sliding_window_pattern": 3},
        (0, 2, 5),
        {"layer_types": [SLIDING, FULL, FULL]},
    ),
    (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
        (0, 2, 3, 4),
        {"layer_types": [FULL, FULL, SLIDING, SLIDING], "max_window_layers": 2},
    ),
    (
        "SmolLM3Config",
        {"no_rope_layer_interval": 3},
        (0, 2, 4, 5),
        {"no_rope_layers": [1, 0, 1, 0]},
    ),
    (
        "Qwen3MoeConfig",
        {**EXPERTS, "mlp_only_layers": [2, 4]},
        (0, 2, 3, 5),
        {"mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    (
        "Qwen3MoeConfig",
        {**EXPERTS, "decoder_sparse_step": 2},
        (0, 2, 3, 4, 5),
        {"mlp_only_layers": [0, 1, 3], "decoder_sparse_step": 1},
    ),
    (
        "Llama4TextConfig",
        {**EXPERTS, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
        (0, 1, 2, 4, 5),
        {"moe_layers": [1, 4]},
    ),
    (
        "DeepseekV3Config",
        {"first_k_dense_replace": 3, "num_key_value_heads": 4},
        (0, 2, 3, 5),
        {"first_k_dense_replace": 2, "num_nextn_predict_layers": 1},
    ),
    (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_layer_start_index": 1, "moe_k": 2, "moe_layer_end_index": 4},
        (1, 2, 4, 5),
        {"moe_layer_start_index": 0, "moe_layer_end_index": 2},
    ),
    (
        "GPTNeoConfig",
        {"num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]]},
        (0, 1, 2, 4),
        {
            "attention_layers": ["global", "local", "global", "global"],
            "attention_types": [[["global", "local", "global", "global"], 1]],
        },
    ),
    (
        "Gemma3nTextConfig",
        GEMMA3N,
        (0, 1, 2, 3, 5),
        {"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.5, 0.4, 0.3, 0.2, 0.0]},
    ),
    ("LongcatFlashConfig", {"num_layers": 6}, (0, 2, 5), {"num_layers": 3, "num_hidden_layers": 6}),
    (
        "BambaConfig",
        {**BAMBA, "attn_layer_indices": [2, 5]},
        (0, 2, 3, 5),
        {"attn_layer_indices": [1, 3]},
    ),
    ("JambaConfig", JAMBA, (0, 1, 2, 3), {"attn_layer_period": 4, "attn_layer_offset": 3}),
    ("JambaConfig", JAMBA, (2, 3, 6, 7), {"attn_layer_period": 2, "attn_layer_offset": 1}),
    (
        "RecurrentGemmaConfig",
        {
            "lru_width": 32,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
        (0, 2, 3, 5),
        {"block_types": ["recurrent", "attention"] * 2},
    ),
]


def make(name: str, entries: dict[str, Any]) -> PreTrainedConfig:
    config_class = getattr(transformers, name)
    known = {**SHAPE, **entries}
    if "num_hidden_layers" in config_class.attribute_map or name == "LongcatFlashConfig":
        del known["num_hidden_layers"]
    return config_class(**known)


@pytest.mark.parametrize(("name", "entries", "kept", "wanted"), CASES)
def test_entries_are_cut_as_the_class_reads_them(
    name: str, entries: dict[str, Any], kept: tuple[int, ...], wanted: dict[str, Any]
) -> None:
    config = make(name, entries)
    before = config.to_dict()
    cut = cut_config(config, kept)
    assert {key: getattr(cut.config, key) for key in wanted} == wanted
    assert config.to_dict() == before, "the dense config must stay as it is"
    check_cut(stock_class(config), config, cut.config, kept, allow_packed=True)
    for key, value in wanted.items():
        told = any(line.startswith(f"{key}: ") for line in cut.changes)
        assert told == (key in vars(config) and getattr(config, key) != value), cut.changes


def test_a_scale_by_depth_is_kept_to_the_last_digit() -> None:
    """MiniCPM3 scales residuals by scale_depth / sqrt(num_hidden_layers)."""
    entries = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    }
    model = AutoModelForCausalLM.from_config(make("MiniCPM3Config", entries))
    before = model.model.layers[0].residual_scale
    cut = cut_config(model.config, (0, 2, 5)).config
    assert AutoModelForCausalLM.from_config(cut).model.layers[0].residual_scale == before


def test_lists_as_long_as_the_depth_by_coincidence_stay() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 1.1, 1.2, 1.3],
        "original_max_position_embeddings": 32,
    }
    config = transformers.Phi3Config(
        **{**SHAPE, "num_hidden_layers": 4},
        rope_parameters=rope,
        eos_token_id=[1, 2, 3, 5],
        id2label={i: f"class {i}" for i in range(4)},
    )
    cut = cut_config(config, (0, 3)).config
    check_cut(stock_class(config), config, cut, (0, 3))
    for name in ("rope_parameters", "eos_token_id", "id2label"):
        assert getattr(cut, name) == getattr(config, name)


def test_overrides_of_single_layers_are_renumbered() -> None:
    """Transformers' heterogeneous configs: entries of one layer under its index."""
    config = LlamaConfig(**SHAPE, per_layer_config={1: {"head_dim": 4}, 4: {"head_dim": 16}})
    cut = cut_entries(config, depth_of(config, (0, 2, 4)))
    assert [layer.head_dim for layer in cut.per_layer_config] == [8, 8, 16]
    cut = cut_entries(config, depth_of(config, (0, 2)))
    assert [layer.head_dim for layer in cut.per_layer_config] == [8, 8]


def test_only_the_text_part_of_a_composite_config_is_cut() -> None:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**SHAPE, "head_dim": 8, "sliding_window_pattern": 3}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=vision,
        image_token_id=96,
        mm_tokens_per_image=4,
    )
    cut = cut_config(config, (0, 2, 5)).config
    assert cut.text_config.layer_types == [SLIDING, FULL, FULL]
    assert cut.vision_config.num_hidden_layers == 6
    model = AutoModelForCausalLM.from_config(config).eval()
    assert find_decoder_layers(model).path == "model.language_model.layers"
    ids = torch.arange(3, 13).view(1, 10)
    remove_layers(model, (1, 3, 4))
    assert text_part(model.config).layer_types == [SLIDING, FULL, FULL]
    cached = model.generate(ids, do_sample=False, max_new_tokens=8)
    assert torch.equal(
        model.generate(ids, do_sample=False, max_new_tokens=8, use_cache=False), cached
    )


def refusal(config: PreTrainedConfig, removed: tuple[int, ...]) -> str:
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in removed]
    cut = cut_config(config, kept)
    with pytest.raises(SurgeryError) as error:
        check_cut(stock_class(config), config, cut.config, kept)
    return str(error.value)


def passes(config: PreTrainedConfig, removed: tuple[int, ...]) -> bool:
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in removed]
    try:
        check_cut(stock_class(config), config, cut_config(config, kept).config, kept)
    except SurgeryError:
        return False
    return True


def test_attention_scaled_by_the_layer_index() -> None:
    """GPT-2's scale_attn_by_inverse_layer_idx: a layer at a new index would scale otherwise."""
    config = make(
        "GPT2Config",
        {"n_embd": 32, "n_layer": 6, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    )
    message = refusal(config, (1, 4))
    assert "for layers 2-3, 5 (layer 2 attn: scaling was" in message
    assert message.endswith("What may be removed instead: the last 2 (4-5)")
    assert passes(config, (4, 5))
    assert passes(config, (5,))
    assert not passes(config, (0,))


def test_a_pattern_that_only_whole_groups_leave_intact() -> None:
    config = make("JambaConfig", JAMBA)
    message = refusal(config, (2,))
    assert message.endswith("removed instead: any 4 in a row (0-3, 1-4, ...) or one of 0, 7")
    assert passes(config, (7,))
    assert passes(config, (2, 3, 4, 5))


def test_layers_that_reuse_what_a_removed_one_computed() -> None:
    """GLM's sparse attention: "shared" layers take the tokens that an earlier layer chose."""
    entries = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "indexer_types": ["full", "full", "shared", "shared", "full", "full"],
    }
    config = make("GlmMoeDsaConfig", entries)
    assert "layer 2 reuses the indexer_types of layer 1" in refusal(config, (1,))
    assert passes(config, (1, 2, 3))
    assert passes(config, (2,))


def test_layers_that_share_keys_and_values() -> None:
    """Gemma 3n: layers 4 and 5 attend to the keys of layers 2 and 3, the last of their kind."""
    config = make("Gemma3nTextConfig", {**GEMMA3N, "layer_types": [FULL, SLIDING] * 3})
    kept = (0, 1, 2, 4, 5)
    cut = cut_config(config, kept).config
    with pytest.raises(SurgeryError, match="store_full_length_kv"):
        check_cut(stock_class(config), config, cut, kept, allow_packed=True)
    with pytest.raises(SurgeryError, match="embed_tokens_per_layer: weight holds entries of ev"):
        check_cut(
            stock_class(config), config, cut_config(config, (0, 1, 2, 3, 4)).config, (0, 1, 2, 3, 4)
        )


def test_a_hybrid_keeps_an_attention_layer() -> None:
    """Stock caches of linear attention alone cannot tell how many tokens they have seen."""
    config = make("BambaConfig", {**BAMBA, "attn_layer_indices": [2, 4]})
    assert "one of the attention layers 2, 4 must stay" in refusal(config, (2, 4))
    assert passes(config, (0, 2))


def test_a_wrong_cut_is_noticed() -> None:
    config = make("Gemma3TextConfig", {"sliding_window_pattern": 3})
    cut = cut_config(config, (0, 2, 5)).config
    cut.layer_types = [SLIDING, SLIDING, FULL]
    with pytest.raises(SurgeryError, match=r"layers 2 \(layer 2 .*was full_attention, would be"):
        check_cut(stock_class(config), config, cut, (0, 2, 5))


def test_a_wrong_kind_that_only_the_forward_would_see() -> None:
    """Caches and masks are chosen by config.layer_types; a Llama layer has no mark of it."""
    config = make("LlamaConfig", {"layer_types": [SLIDING, FULL] * 3, "sliding_window": 4})
    cut = cut_config(config, (0, 2, 5)).config
    check_cut(stock_class(config), config, cut, (0, 2, 5))
    cut.layer_types = [SLIDING, FULL, FULL]
    with pytest.raises(SurgeryError, match="layer 2 layer_types was sliding_attention, would be f"):
        check_cut(stock_class(config), config, cut, (0, 2, 5))


def test_heads_of_prediction_are_no_layers() -> None:
    """They stay in a cut config; a model in memory has none, and says so when it is saved."""
    config = make("MellumConfig", {**EXPERTS, "num_mtp_layers": 1})
    assert config.mtp_layer_types == [SLIDING]
    cut = cut_config(config, (0, 1, 5)).config
    assert (cut.num_mtp_layers, cut.mtp_layer_types) == (1, [SLIDING])
    model = AutoModelForCausalLM.from_config(config)
    with layers_removed(model, (1,)):
        assert (model.config.num_mtp_layers, model.config.mtp_layer_types) == (0, [])
    assert (model.config.num_mtp_layers, model.config.mtp_layer_types) == (1, [SLIDING])
    config = LlamaConfig(**SHAPE, num_mtp_layers=6, mtp_layer_types=[FULL] * 6)
    assert cut_entries(config, depth_of(config, (0, 2))).mtp_layer_types == [FULL] * 6


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        ((), "at least one, in rising order"),
        ((3, 1), "in rising order, got \\[3, 1\\]"),
        ((1, 1), "named once each"),
        ((0, 6), "from 0 to 5, got 6"),
        ((-1, 0), "from 0 to 5, got -1"),
    ],
)
def test_bad_layers(kept: tuple[int, ...], wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted):
        cut_config(LlamaConfig(**SHAPE), kept)


def test_a_config_without_a_layer_count() -> None:
    with pytest.raises(SimdiffError, match="must have a number of layers.*num_hidden_layers"):
        cut_config(PreTrainedConfig(), (0,))


def test_a_model_that_is_not_what_its_config_says() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    model.model.layers[3].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(SurgeryError, match=r"not what stock .* layer 3 mlp.up_proj: shape of wei"):
        remove_layers(model, (1,))
    assert len(model.model.layers) == 6
