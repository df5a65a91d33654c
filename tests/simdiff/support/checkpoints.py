"""Small checkpoints on disk, sharded or not, and plans for them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from simdiff.models.identity import model_identity
from simdiff.planning.plan import PruningPlan

ROPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**ROPE),
    "llama, tied": LlamaConfig(**ROPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**ROPE, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=6,
        ffn_dim=48,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    "mixtral": MixtralConfig(**ROPE, num_local_experts=12),  # experts 10 and 11 sort before 2
    "qwen3-moe": Qwen3MoeConfig(
        **ROPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "deepseek-v3": DeepseekV3Config(
        **{**ROPE, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
    ),
}
REMOVED = (4, 1)
KEPT = (0, 2, 3, 5)


def save_model(
    family: str, directory: Path, max_shard_size: str = "20KB", dtype: str = "float32"
) -> PreTrainedModel:
    """Save random weights, every tensor with its own, and load them as stock transformers does."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def plan_for(model: PreTrainedModel, removed: tuple[int, ...] = REMOVED) -> PruningPlan:
    identity = model_identity(model, "tiny")
    num_layers = identity["num_layers"]
    return PruningPlan(
        removed=removed,
        num_layers=num_layers,
        protected=(),
        criterion="block-influence",
        formula="",
        alpha=None,
        importance=(0.0,) * num_layers,
        ranking=tuple(range(num_layers)),
        notes=(),
        model=identity,
        calibration={},
    )


def content(directory: Path) -> dict[str, bytes]:
    """All files of a directory, without the plan, which tells the time."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "plan.json"
    }


def read_raw(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file, read by hand."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: object, data: bytes) -> None:
    """Any header, right or wrong, before any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json(path: Path, **changes: object) -> None:
    """Replace entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
