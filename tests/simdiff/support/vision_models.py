"""Tiny vision-language models with random weights and 6 decoder layers; also 6 in the tower."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from support.families import SHAPE

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
_QWEN_IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_LLAMA = {**SHAPE, "model_type": "llama"}

VISION_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl": (
        "Qwen2VL",
        {
            "text_config": {**SHAPE, **_SECTIONS},
            "vision_config": {
                "depth": 6,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
            },
            **_QWEN_IDS,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**SHAPE, **_SECTIONS},
            "vision_config": {
                "depth": 6,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "fullatt_block_indexes": [5],
            },
            **_QWEN_IDS,
        },
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {
            "text_config": {
                **SHAPE,
                "head_dim": 8,
                "rope_parameters": _SECTIONS["rope_parameters"] | {"mrope_interleaved": True},
            },
            "vision_config": {
                "depth": 6,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [1],
            },
            **_QWEN_IDS,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": _LLAMA,
            "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 90,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {
                **SHAPE,
                "head_dim": 8,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            "vision_config": _TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
    "idefics3": (
        "Idefics3",
        {"text_config": _LLAMA, "vision_config": _TOWER, "image_token_id": 90, "scale_factor": 1},
    ),
    "smolvlm": (
        "SmolVLM",
        {"text_config": _LLAMA, "vision_config": _TOWER, "image_token_id": 90, "scale_factor": 1},
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**SHAPE, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 90,
        },
    ),
}


def vision_config(family: str) -> Any:
    """The config as a checkpoint of the family has it, with the name of its class."""
    name, entries = VISION_FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**entries)
    config.architectures = [f"{name}ForConditionalGeneration"]
    return config


def tiny_vision(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    config = vision_config(family)
    return getattr(transformers, config.architectures[0])(config).eval()
