"""Refuse cuts after which a GGUF runtime would compute a kept layer in another way.

llama.cpp reads many properties of a layer from arrays, which are cut. Others it derives from the
layer's position or from the depth: every sixth layer of Gemma 3 attends to all tokens, and 62
layers mean another attention scale. The tables here were taken from llama.cpp's src/models (the
version in llama-cpp-python 0.3.36). A cut that changes any of these properties is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simdiff.checkpoints.gguf.container import GgufFile
from simdiff.errors import SimdiffError

# Default period of the sliding-window pattern, and whether the layer without a window is the first
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
# Layers without rotary embedding, which are chosen by position even if a pattern is stored.
_NO_ROPE = {
    "smollm3": (4, False),
    "llama4": (4, False),
    "afmoe": (4, False),
    "smallthinker": (4, True),
}
_LINEAR_ATTENTION = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
_MOE_STEP = ("llama4", "ernie4_5-moe")

_REFUSED = {
    "baichuan": "llama.cpp knows it with 32 and 40 layers only",
    "gemma3n": "its per-layer embeddings are one tensor, and its last layers use the keys and "
    "values of layer 19 and 18",
    "t5": "it has an encoder",
    "t5encoder": "it has no decoder",
    "clip": "it holds an image encoder, not a language model",
    "wavtokenizer-dec": "it holds an audio decoder, not a language model",
    "nomic-bert-moe": "it has no decoder",
}
# Tensors that contain a slice for every layer.
_SLICED_TENSORS = ("per_layer_token_embd.weight", "per_layer_model_proj.weight")
# Arrays of the model that have nothing to do with its layers.
_OTHER_ARRAYS = ("rope.dimension_sections", "classifier.output_labels")
_COUNTS_LAYERS = re.compile(r"(^|[._])(layers?|blocks?)([._]|$)")
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
    """Position within a period of the layer that differs from the others."""

    def kind(self, layer: int) -> bool:
        return layer % self.period == self.odd_one


def check_architecture(gguf: GgufFile, architecture: str) -> None:
    """Refuse a file that is not a decoder whose layers can be removed.

    Raises:
        SimdiffError: says why.
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
    """Refuse tensors that belong to layers although their names do not show it."""
    for name in names:
        if name in _SLICED_TENSORS:
            raise SimdiffError(
                f"{gguf.path}: tensor {name} holds a slice for every layer, within quantised "
                "rows; cut the original checkpoint and convert that"
            )
        if re.match(r"(enc|dec|v|a|mm)\.", name):
            raise SimdiffError(f"{gguf.path}: must hold a decoder alone, but has the tensor {name}")


def check_positions(
    gguf: GgufFile, architecture: str, num_layers: int, removed: Sequence[int]
) -> None:
    """Refuse a cut after which a runtime would compute a kept layer in another way.

    Args:
        gguf: the first file of the model.
        architecture: value of general.architecture.
        num_layers: number of layers, without those for multi-token prediction.
        removed: layers to remove, counted from 0.

    Raises:
        SimdiffError: says what would change, and which layers may be removed instead.
    """
    meta = _Metadata(gguf, architecture)
    kept = [layer for layer in range(num_layers) if layer not in removed]
    _check_counts(meta, removed)
    for pattern in _patterns(meta, num_layers):
        moved = [
            layer for new, layer in enumerate(kept) if pattern.kind(new) != pattern.kind(layer)
        ]
        if moved:
            raise SimdiffError(
                f"{gguf.path}: this cut cannot be expressed: {architecture} tells "
                f"{pattern.name} by position, every {pattern.period} layers, and layer "
                f"{moved[0]} would change its kind (so would {len(moved) - 1} more). Layers may go "
                f"in runs of {pattern.period} consecutive ones, such as "
                f"{_example_run(min(removed), pattern.period, num_layers)}, and at the very end"
            )
    before = _facts_of_depth(meta, num_layers)
    after = _facts_of_depth(meta, len(kept))
    for fact, value in before.items():
        if value != after[fact]:
            raise SimdiffError(
                f"{gguf.path}: this cut cannot be expressed: llama.cpp takes {fact} of "
                f"{architecture} from the number of layers: {value} at {num_layers}, but "
                f"{after[fact]} at {len(kept)}. Cut the original checkpoint and run that with "
                "transformers, or remove another number of layers"
            )


def _example_run(first: int, period: int, num_layers: int) -> str:
    start = max(0, min(first, num_layers - period))
    return f"{start}-{start + period - 1}"


class _Metadata:
    """Entries of the architecture, by their keys without the architecture's prefix."""

    def __init__(self, gguf: GgufFile, architecture: str) -> None:
        self.gguf, self.architecture = gguf, architecture
        self.prefix = architecture + "."

    def whole(self, name: str, default: int) -> int:
        key = self.prefix + name
        return default if self.gguf.is_array(key) else self.gguf.whole(key, default)

    def has_array(self, name: str) -> bool:
        return self.gguf.is_array(self.prefix + name)

    def names(self) -> list[str]:
        return [
            key.removeprefix(self.prefix)
            for key in self.gguf.entries
            if key.startswith(self.prefix)
        ]


def _patterns(meta: _Metadata, num_layers: int) -> list[_Pattern]:
    architecture, found = meta.architecture, []
    # Without the entry the architecture's default window applies.
    windowed = meta.whole("attention.sliding_window", 1) > 0
    if architecture in ("gemma3", "olmo2", "plamo3", "afmoe", "smallthinker", "modern-bert"):
        windowed = meta.whole("attention.sliding_window", 0) > 0
    if architecture == "exaone4":
        windowed = num_layers == 64
    if windowed and architecture in _SLIDING:
        default, first = _SLIDING[architecture]
        if not meta.has_array("attention.sliding_window_pattern"):
            period = meta.whole("attention.sliding_window_pattern", default)
            found.append(("layers without a sliding window", period, first))
    if architecture in _NO_ROPE and (windowed or architecture in ("smollm3", "afmoe")):
        found.append(("layers without rotary embedding", *_NO_ROPE[architecture]))
    if architecture in _LINEAR_ATTENTION and not meta.has_array("attention.recurrent_layers"):
        period = meta.whole("full_attention_interval", _LINEAR_ATTENTION[architecture])
        found.append(("layers of full attention", period, False))
    if architecture in _MOE_STEP:
        step = meta.whole("interleave_moe_layer_step", 1)
        found.append(("layers with experts", step, False))
    return [
        _Pattern(name, period, 0 if first else period - 1)
        for name, period, first in found
        if period > 1
    ]


def _facts_of_depth(meta: _Metadata, num_layers: int) -> dict[str, Any]:
    architecture = meta.architecture
    if architecture in ("gemma2", "gemma3"):
        width = meta.whole("embedding_length", 0) // max(1, meta.whole("attention.head_count", 1))
        largest = {"gemma2": 46, "gemma3": 62}[architecture]
        scale = width if num_layers == largest else meta.whole("attention.key_length", width)
        return {"the attention scale": f"1/sqrt({scale})"}
    if architecture == "deepseek2":
        vocabulary = meta.whole("vocab_size", 0)
        lite = num_layers in (26, 27) or (num_layers == 48 and vocabulary == 128256)
        glm = num_layers in (47, 48) and vocabulary == 154880
        facts = (
            {}
            if "expert_gating_func" in meta.names()
            else {"the gating function": "sigmoid" if glm else "softmax"}
        )
        return facts | {"the rank of the queries": "full" if lite else "low"}
    if architecture == "exaone4":
        return {"the sliding window": "4096" if num_layers == 64 else "none"}
    if architecture == "minicpm" and "residual_scale" not in meta.names():
        return {"the residual scale": f"1.4/sqrt({num_layers})"}
    return {}


def _check_counts(meta: _Metadata, removed: Sequence[int]) -> None:
    """Refuse numbers in the metadata that count or name layers in a way that a cut would break."""

    def refuse(name: str, why: str) -> SimdiffError:
        return SimdiffError(f"{meta.gguf.path}: {meta.prefix}{name} {why}")

    if meta.whole("attention.shared_kv_layers", 0):
        raise refuse(
            "attention.shared_kv_layers",
            "lets the last layers use keys and values of earlier ones, which a cut would change; "
            "such a model cannot be cut",
        )
    if meta.whole("rescale_every_n_layers", 0):
        raise refuse(
            "rescale_every_n_layers",
            "halves the hidden states at fixed positions, and the weights are scaled for that; "
            "such a model cannot be cut",
        )
    deepstack = meta.whole("n_deepstack_layers", 0)
    if deepstack and min(removed) < deepstack:
        raise refuse(
            "n_deepstack_layers",
            f"adds image features after the first {deepstack} layers: these must stay; "
            f"protect layers 0-{deepstack - 1} in the plan",
        )
    for name in meta.names():
        if _COUNTS_LAYERS.search(name) and name not in _KNOWN_COUNTS and not meta.has_array(name):
            raise refuse(
                name, "seems to count layers, but its meaning is unknown here: nothing was cut"
            )


def is_per_layer(name: str, count: int, lengths: Sequence[int]) -> bool:
    """Whether an array of the model has one element for each layer.

    Args:
        name: key of the array without the architecture's prefix.
        count: number of elements of the array.
        lengths: the numbers of layers, with and without those for multi-token prediction.
    """
    return name not in _OTHER_ARRAYS and count in lengths


def is_unrelated(name: str) -> bool:
    """Whether an array of the model is known to have nothing to do with its layers."""
    return name in _OTHER_ARRAYS
