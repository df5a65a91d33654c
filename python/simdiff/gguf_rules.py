"""What a GGUF runtime derives from a block's position or from the depth, and not from the file.

A block that moves must compute what it computed before. llama.cpp reads much of it from arrays,
which are cut; the rest it derives: every sixth block of Gemma 3 attends to everything, 62 blocks
mean another attention scale. The tables were read in llama.cpp's src/models (the version within
llama-cpp-python 0.3.36). A cut that changes anything in them is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.gguf_format import GgufFile

# Default period of the sliding-window pattern, and whether the block without a window is the first
# of a period (it is the last otherwise).
_SLIDING = {
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma-embedding": (6, False),
    "gpt-oss": (2, False),
    "cohere2": (4, False),
    "olmo2": (4, False),
    "exaone4": (4, False),
    "exaone-moe": (4, False),
    "plamo3": (8, False),
    "llama4": (4, False),
    "afmoe": (4, False),
    "smallthinker": (4, True),
    "modern-bert": (3, True),
}
# Blocks without rotary embedding, told by position even where a pattern is stored.
_NO_ROPE = {"smollm3": (4, False), "llama4": (4, False), "afmoe": (4, False),
            "smallthinker": (4, True)}  # fmt: skip
_LINEAR_ATTENTION = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
_MOE_STEP = ("llama4", "ernie4_5-moe")

_REFUSED = {
    "baichuan": "llama.cpp knows it with 32 and 40 blocks only",
    "gemma3n": "its per-layer embeddings are one tensor, and its last blocks use the keys and "
    "values of block 19 and 18",
    "t5": "it has an encoder",
    "t5encoder": "it has no decoder",
    "clip": "it holds an image encoder, not a language model",
    "wavtokenizer-dec": "it holds an audio decoder, not a language model",
    "nomic-bert-moe": "it has no decoder",
}
# Tensors that hold a slice for every block.
_SLICED_TENSORS = ("per_layer_token_embd.weight", "per_layer_model_proj.weight")
# Arrays of the model that have nothing to do with its blocks.
_OTHER_ARRAYS = ("rope.dimension_sections", "classifier.output_labels")
_COUNTS_BLOCKS = re.compile(r"(^|[._])(layers?|blocks?)([._]|$)")
_KNOWN_COUNTS = {
    "block_count",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "interleave_moe_layer_step",
    "attention.shared_kv_layers",
    "n_deepstack_layers",
    "rescale_every_n_layers",
    "embedding_length_per_layer_input",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
}


@dataclass(frozen=True)
class _Pattern:
    name: str
    period: int
    odd_one: int
    """Which position within a period is unlike the others."""

    def kind(self, block: int) -> bool:
        return block % self.period == self.odd_one


def check_architecture(gguf: GgufFile, architecture: str) -> None:
    """Refuse what is not a decoder whose blocks can be taken out of the file.

    Raises:
        SimdiffError: why.
    """
    from gguf.constants import MODEL_ARCH_NAMES

    kind = gguf.get("general.type", "model")
    if kind != "model":
        raise SimdiffError(f"{gguf.path}: must hold a model, got general.type {kind!r}")
    why = _REFUSED.get(architecture)
    if why is None and architecture not in MODEL_ARCH_NAMES.values():
        why = "the installed gguf package does not know it; upgrade gguf"
    if why is not None:
        raise SimdiffError(f"{gguf.path}: architecture {architecture!r} cannot be cut: {why}")


def check_tensors(gguf: GgufFile, names: Sequence[str]) -> None:
    """Refuse tensors that belong to blocks without saying so in their names."""
    for name in names:
        if name in _SLICED_TENSORS:
            raise SimdiffError(
                f"{gguf.path}: tensor {name} holds a slice for every block, within quantised "
                "rows; cut the original checkpoint and convert that"
            )
        if re.match(r"(enc|dec|v|a|mm)\.", name):
            raise SimdiffError(f"{gguf.path}: must hold a decoder alone, but has the tensor {name}")


def check_positions(
    gguf: GgufFile, architecture: str, num_blocks: int, removed: Sequence[int]
) -> None:
    """Refuse a cut after which a runtime would compute something else for a block that stays.

    Args:
        gguf: the first file of the model.
        architecture: general.architecture.
        num_blocks: without blocks for multi-token prediction.
        removed: blocks that go, counted from 0.

    Raises:
        SimdiffError: what would change, and which blocks may go instead.
    """
    meta = _Metadata(gguf, architecture)
    kept = [block for block in range(num_blocks) if block not in removed]
    _check_counts(meta, removed)
    for pattern in _patterns(meta, num_blocks):
        moved = [
            block for new, block in enumerate(kept) if pattern.kind(new) != pattern.kind(block)
        ]
        if moved:
            raise SimdiffError(
                f"{gguf.path}: this cut cannot be expressed: {architecture} tells "
                f"{pattern.name} by position, every {pattern.period} blocks, and block "
                f"{moved[0]} would change its kind (so would {len(moved) - 1} more). Blocks may go "
                f"in runs of {pattern.period} consecutive ones, such as "
                f"{_example_run(min(removed), pattern.period, num_blocks)}, and at the very end"
            )
    before = _facts_of_depth(meta, num_blocks)
    after = _facts_of_depth(meta, len(kept))
    for fact, value in before.items():
        if value != after[fact]:
            raise SimdiffError(
                f"{gguf.path}: this cut cannot be expressed: llama.cpp takes {fact} of "
                f"{architecture} from the number of blocks: {value} at {num_blocks}, but "
                f"{after[fact]} at {len(kept)}. Cut the original checkpoint and run that with "
                "transformers, or remove another number of layers"
            )


def _example_run(first: int, period: int, num_blocks: int) -> str:
    start = max(0, min(first, num_blocks - period))
    return f"{start}-{start + period - 1}"


class _Metadata:
    """Entries of the architecture, by the part of their key behind its name."""

    def __init__(self, gguf: GgufFile, architecture: str) -> None:
        self.gguf, self.architecture = gguf, architecture
        self.prefix = architecture + "."

    def get(self, name: str, default: Any = None) -> Any:
        key = self.prefix + name
        return default if self.gguf.is_array(key) else self.gguf.get(key, default)

    def has_array(self, name: str) -> bool:
        return self.gguf.is_array(self.prefix + name)

    def names(self) -> list[str]:
        return [
            key.removeprefix(self.prefix)
            for key in self.gguf.entries
            if key.startswith(self.prefix)
        ]


def _patterns(meta: _Metadata, num_blocks: int) -> list[_Pattern]:
    architecture, found = meta.architecture, []
    windowed = meta.get("attention.sliding_window", 1) > 0  # absent: a default of the architecture
    if architecture in ("gemma3", "olmo2", "plamo3", "afmoe", "smallthinker", "modern-bert"):
        windowed = meta.get("attention.sliding_window", 0) > 0
    if architecture == "exaone4":
        windowed = num_blocks == 64
    if windowed and architecture in _SLIDING:
        default, first = _SLIDING[architecture]
        if not meta.has_array("attention.sliding_window_pattern"):
            period = meta.get("attention.sliding_window_pattern", default)
            found.append(("blocks without a sliding window", period, first))
    if architecture in _NO_ROPE and (windowed or architecture in ("smollm3", "afmoe")):
        found.append(("blocks without rotary embedding", *_NO_ROPE[architecture]))
    if architecture in _LINEAR_ATTENTION and not meta.has_array("attention.recurrent_layers"):
        period = meta.get("full_attention_interval", _LINEAR_ATTENTION[architecture])
        found.append(("blocks of full attention", period, False))
    if architecture in _MOE_STEP:
        step = meta.get("interleave_moe_layer_step", 1)
        found.append(("blocks with experts", step, False))
    return [
        _Pattern(name, period, 0 if first else period - 1)
        for name, period, first in found
        if period > 1
    ]


def _facts_of_depth(meta: _Metadata, num_blocks: int) -> dict[str, Any]:
    architecture = meta.architecture
    if architecture in ("gemma2", "gemma3"):
        width = meta.get("embedding_length", 0) // max(1, meta.get("attention.head_count", 1))
        largest = {"gemma2": 46, "gemma3": 62}[architecture]
        scale = width if num_blocks == largest else meta.get("attention.key_length", width)
        return {"the attention scale": f"1/sqrt({scale})"}
    if architecture == "deepseek2":
        vocabulary = meta.get("vocab_size", 0)
        lite = num_blocks in (26, 27) or (num_blocks == 48 and vocabulary == 128256)
        glm = num_blocks in (47, 48) and vocabulary == 154880
        facts = (
            {}
            if "expert_gating_func" in meta.names()
            else {"the gating function": "sigmoid" if glm else "softmax"}
        )
        return facts | {"the rank of the queries": "full" if lite else "low"}
    if architecture == "exaone4":
        return {"the sliding window": "4096" if num_blocks == 64 else "none"}
    if architecture == "minicpm" and "residual_scale" not in meta.names():
        return {"the residual scale": f"1.4/sqrt({num_blocks})"}
    return {}


def _check_counts(meta: _Metadata, removed: Sequence[int]) -> None:
    """Numbers in the metadata that count blocks, or name them."""

    def refuse(name: str, why: str) -> SimdiffError:
        return SimdiffError(f"{meta.gguf.path}: {meta.prefix}{name} {why}")

    if meta.get("attention.shared_kv_layers", 0):
        raise refuse(
            "attention.shared_kv_layers",
            "lets the last blocks use keys and values of earlier ones, which a cut would change; "
            "such a model cannot be cut",
        )
    if meta.get("rescale_every_n_layers", 0):
        raise refuse(
            "rescale_every_n_layers",
            "halves the hidden states at fixed positions, and the weights are scaled for that; "
            "such a model cannot be cut",
        )
    deepstack = meta.get("n_deepstack_layers", 0)
    if deepstack and min(removed) < deepstack:
        raise refuse(
            "n_deepstack_layers",
            f"adds image features after the first {deepstack} blocks: these must stay; "
            f"protect layers 0-{deepstack - 1} in the plan",
        )
    for name in meta.names():
        if _COUNTS_BLOCKS.search(name) and name not in _KNOWN_COUNTS and not meta.has_array(name):
            raise refuse(
                name, "seems to count blocks, but its meaning is unknown here: nothing was cut"
            )


def is_per_block(name: str, count: int, lengths: Sequence[int]) -> bool:
    """Whether an array of the model has one element for each block.

    Args:
        name: its key behind the architecture's name.
        count: its number of elements.
        lengths: the numbers of blocks, with and without those for multi-token prediction.
    """
    return name not in _OTHER_ARRAYS and count in lengths


def is_unrelated(name: str) -> bool:
    """Whether an array of the model is known to have nothing to do with its blocks."""
    return name in _OTHER_ARRAYS
