"""A plan of sub-layers as a checkpoint with no-op blocks, which vLLM builds without them.

No config of transformers says that a layer lacks its attention or its MLP. vLLM's class
DeciLMForCausalLM reads that from `block_configs`, one entry for each layer, as the checkpoints of
Llama-3_1-Nemotron-51B have it; its blocks are otherwise those of LLaMA. Not run with vLLM itself.

Source: vLLM, vllm/model_executor/models/nemotron_nas.py, and `NemotronNasModelArchConfigConvertor`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simdiff.checkpoints.config_file import CONFIG_FILE, Entries, config_bytes, read_entries
from simdiff.checkpoints.other_files import copy_other_files, sort_other_files
from simdiff.checkpoints.quantiser import QUANTISER_ENTRIES, Modules
from simdiff.checkpoints.shards import (
    DEFAULT_SHARD_SIZE,
    check_space,
    parse_size,
    split_shards,
    write_index,
    write_shards,
)
from simdiff.checkpoints.tensor_names import LayerNumbers, layer_of
from simdiff.checkpoints.weight_index import read_weights, weight_files
from simdiff.errors import SurgeryError
from simdiff.io.kinds import PLAN_FILE, Kind
from simdiff.io.outputs import check_apart, new_directory, write_bytes
from simdiff.models.identity import check_same_model
from simdiff.models.loading import load_config, meta_model
from simdiff.sublayers.plan import SublayerPlan
from simdiff.sublayers.structure import ATTENTION, KINDS, MLP, SublayerName

ARCHITECTURE, CLASS = "LlamaForCausalLM", "DeciLMForCausalLM"
_PREFIX = "model.layers"
# Modules of a LLaMA layer that belong to each of its sub-layers.
_MODULES = {
    ATTENTION: ("self_attn", "input_layernorm"),
    MLP: ("mlp", "post_attention_layernorm"),
}

CODE_FILE = "configuration_no_op_blocks.py"
CODE = '''\
"""The config of a LLaMA model that lacks the attention or the MLP of some layers.

Written by simdiff-kernels. vLLM's class DeciLMForCausalLM reads `block_configs`.
"""

from transformers import LlamaConfig


class Block(dict):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NoOpBlocksConfig(LlamaConfig):
    """LLaMA's config with an entry for each layer: `attention.no_op` and `ffn.no_op`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()}) for block in block_configs
        ]
'''


def write_no_op_blocks(
    source: Path,
    plan: SublayerPlan,
    output: Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write a LLaMA checkpoint without the sub-layers of a plan; tensors are copied as stored.

    Layers keep their numbers. The directory appears whole or not at all; vLLM loads it with
    `--trust-remote-code`, since its config.json names a class in a file beside it.

    Args:
        source: directory of a safetensors checkpoint of LlamaForCausalLM, not quantised.
        plan: of `simdiff.sublayers.plan.plan_sublayers`, for this model.
        output: new directory.
        max_shard_size: largest weight file.
        overwrite: replace an earlier output.

    Raises:
        SurgeryError: another architecture, a quantised one, or sub-layers that vLLM's class cannot
            do without.
        SimdiffError: the checkpoint is damaged, or the plan is for another model.
    """
    check_apart(source, output)
    entries = read_entries(source)
    _check(source, entries, plan)
    weights = read_weights(source)
    gone = removed_prefixes(plan)
    kept = {n: t for n, t in weights.tensors.items() if not n.startswith(gone)}
    foreign = [n for n in weights.tensors if layer_of(n, _PREFIX) is not None and not _known(n)]
    if foreign:
        raise SurgeryError(f"{source}: {foreign[0]} is no tensor of a layer of {ARCHITECTURE}")
    shards = split_shards([[(n, t)] for n, t in kept.items()], parse_size(max_shard_size))
    others = sort_other_files(source, weight_files(source))
    unchanged = Modules({}, LayerNumbers(_PREFIX, {}, _PREFIX))
    with new_directory(output, overwrite, Kind.MODEL) as scratch:
        check_space(scratch, sum(tensor.num_bytes for tensor in kept.values()))
        write_shards(shards, scratch, {"format": "pt"} | weights.metadata)
        write_index(shards, scratch, sum(_size(tensor.shape) for tensor in kept.values()))
        copy_other_files(others, source, scratch, unchanged)
        plan.save(scratch / PLAN_FILE)
        (scratch / CODE_FILE).write_text(CODE, encoding="utf-8")
        write_bytes(scratch / CONFIG_FILE, config_bytes(with_blocks(entries, plan), source))


def _check(source: Path, entries: Entries, plan: SublayerPlan) -> None:
    check_architecture(source, entries)
    check_same_model(meta_model(load_config(source)), plan.model, "plan")
    stays = [
        SublayerName(layer, kind)
        for layer in range(plan.num_layers)
        for kind in KINDS
        if (layer, kind) not in plan.removed
    ]
    if stays[0].kind != ATTENTION:
        raise SurgeryError(
            f"{source}: vLLM's {CLASS} adds the first residual in the norm before an attention, so "
            f"the first sub-layer that stays must be one, and is {stays[0]}: protect layer "
            f"{stays[0].layer}, or remove its MLP too"
        )


def check_architecture(source: Path, entries: Entries) -> None:
    """Refuse a model whose layers vLLM's class does not have.

    Args:
        source: its directory, for messages.
        entries: of its config.json.

    Raises:
        SurgeryError: another architecture, or a quantised one.
    """
    found = entries.get("architectures")
    if found != [ARCHITECTURE]:
        raise SurgeryError(
            f"{source}: no-op blocks are those of vLLM's {CLASS}, whose layers are those of "
            f"{ARCHITECTURE}; the architecture is {json.dumps(found)}"
        )
    if any(entries.get(name) for name in QUANTISER_ENTRIES):
        raise SurgeryError(f"{source}: no-op blocks of a quantised checkpoint are not written")


def removed_prefixes(plan: SublayerPlan) -> tuple[str, ...]:
    """How the names of the tensors begin that a plan takes out."""
    return tuple(
        f"{_PREFIX}.{name.layer}.{module}."
        for name in plan.removed
        for module in _MODULES[name.kind]
    )


def _known(name: str) -> bool:
    module = name.removeprefix(f"{_PREFIX}.").split(".")[1]
    return any(module in modules for modules in _MODULES.values())


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def with_blocks(entries: Entries, plan: SublayerPlan) -> Entries:
    """The config.json of a LLaMA model without the sub-layers of a plan."""
    heads = int(entries["num_attention_heads"])
    per_group = heads // int(entries.get("num_key_value_heads") or heads)
    width = int(entries["intermediate_size"])
    # SGLang, and llama.cpp's converter, know a width by its multiplier alone, which stands for
    # multiples of 256: int(2 * ffn_mult * hidden_size / 3), rounded up to one. vLLM reads both.
    by_multiplier = width % 256 == 0
    size = "ffn_mult" if by_multiplier else "intermediate_size"
    value = 3 * width / (2 * int(entries["hidden_size"])) if by_multiplier else width

    def block(layer: int) -> dict[str, Any]:
        no_attention, no_mlp = ((layer, kind) in plan.removed for kind in (ATTENTION, MLP))
        return {
            "attention": {
                "no_op": no_attention,
                "replace_with_linear": False,
                "n_heads_in_group": None if no_attention else per_group,
            },
            "ffn": {
                "no_op": no_mlp,
                "replace_with_linear": False,
                size: None if no_mlp else value,
            },
        }

    return {
        **entries,
        "architectures": [CLASS],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CODE_FILE.removesuffix('.py')}.NoOpBlocksConfig"},
        "block_configs": [block(layer) for layer in range(plan.num_layers)],
    }
