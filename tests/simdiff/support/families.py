"""Tiny models of every family with random weights, 6 layers unless said otherwise."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

COMMON = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    **COMMON,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
WINDOW = {"sliding_window": 4}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "llama-3.1": (
        "LlamaConfig",
        {
            **SHAPE,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("MistralConfig", {**SHAPE, **WINDOW}),
    "mixtral": ("MixtralConfig", {**SHAPE, **EXPERTS, **WINDOW}),
    "qwen2": (
        "Qwen2Config",
        {**SHAPE, **WINDOW, "use_sliding_window": True, "max_window_layers": 3},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**SHAPE, **EXPERTS, "mlp_only_layers": [2, 4], "shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", {**SHAPE, **EXPERTS, "head_dim": 8, "decoder_sparse_step": 2}),
    "gemma": ("GemmaConfig", {**SHAPE, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**SHAPE, **WINDOW, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, **WINDOW, "head_dim": 8, "sliding_window_pattern": 3}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **SHAPE,
            **WINDOW,
            "head_dim": 8,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        },
    ),
    "phi3": ("Phi3Config", {**SHAPE, **WINDOW}),
    "opt": (
        "OPTConfig",
        {
            **COMMON,
            "hidden_size": 32,
            "num_hidden_layers": 6,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": ("GPT2Config", {**COMMON, "n_embd": 32, "n_layer": 6, "n_head": 4}),
    "gpt-neo": (
        "GPTNeoConfig",
        {
            **COMMON,
            "hidden_size": 32,
            "num_layers": 6,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", SHAPE),
    "falcon": (
        "FalconConfig",
        {**COMMON, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4},
    ),
    "bloom": ("BloomConfig", {**COMMON, "hidden_size": 32, "n_layer": 6, "n_head": 4}),
    "mpt": ("MptConfig", {**COMMON, "d_model": 32, "n_layers": 6, "n_heads": 4}),
    "olmo2": ("Olmo2Config", SHAPE),
    "stablelm": ("StableLmConfig", SHAPE),
    "cohere2": ("Cohere2Config", {**SHAPE, **WINDOW}),
    "granite": ("GraniteConfig", SHAPE),
    "smollm3": ("SmolLM3Config", {**SHAPE, **WINDOW, "use_sliding_window": True}),
    "llama4": (
        "Llama4TextConfig",
        {
            **SHAPE,
            **EXPERTS,
            "head_dim": 8,
            "attention_chunk_size": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
    "deepseek-v2": ("DeepseekV2Config", {**SHAPE, **LATENT}),
    "deepseek-v3": ("DeepseekV3Config", {**SHAPE, **LATENT}),
    "gpt-oss": ("GptOssConfig", {**SHAPE, **EXPERTS, **WINDOW, "head_dim": 8}),
    "longcat-flash": (
        "LongcatFlashConfig",
        {
            **LATENT,
            **COMMON,
            "hidden_size": 32,
            "num_layers": 6,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "zero_expert_num": 1,
            "head_dim": 8,
        },
    ),
    "minicpm3": ("MiniCPM3Config", {**SHAPE, **LATENT}),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {
            **SHAPE,
            "lru_width": 32,
            "head_dim": 8,
            "attention_window_size": 4,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "qwen3-next": ("Qwen3NextConfig", {**SHAPE, **EXPERTS, **LINEAR, "full_attention_interval": 3}),
    "granite-moe-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **SHAPE,
            **EXPERTS,
            **MAMBA,
            "shared_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 3,
        },
    ),
    "bamba": ("BambaConfig", {**SHAPE, **MAMBA, "attn_layer_indices": [2, 4, 5]}),
    "falcon-h1": ("FalconH1Config", {**SHAPE, **MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "lfm2": ("Lfm2Config", {**SHAPE, "full_attn_idxs": [1, 2, 5]}),
    "nemotron-h": (
        "NemotronHConfig",
        {
            **SHAPE,
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "attention", "mlp"] * 2,
        },
    ),
}
PARALLEL = ("gpt-neox", "falcon", "cohere2")  # attention and MLP read the same state
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 14,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def token_ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))


def tiny(family: str) -> PreTrainedModel:
    name, entries = FAMILIES[family]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**entries)).eval()
    with torch.no_grad():  # biases, gates and scales that start at zero or one must count too
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of the tokens of `token_ids`."""
    return model(input_ids=token_ids(), use_cache=False).logits
