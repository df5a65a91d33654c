"""Make a checkpoint of a large model's shapes that takes no space on the disk.

    python benchmarks/sparse_checkpoint.py /tmp/llama-70b --shape 70b --layers 80

The files are as large as the real ones and hold holes, which read as zeros; the norms are ones, so
that no state is NaN. It measures memory and reading, not what a model can do. `simdiff score` of it
takes token windows: its tokenizer knows one word, "w".
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from simdiff.models.loading import meta_model

SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
    "70b": (8192, 28_672, 80, 64, 8, 128_256),
    "405b": (16_384, 53_248, 126, 128, 8, 128_256),
}
"""Hidden size, MLP size, layers, heads, key and value heads, vocabulary."""


def config_of(shape: str, layers: int | None = None) -> LlamaConfig:
    """The config of a shape, of fewer layers where that is wanted."""
    hidden, mlp, depth, heads, keys, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=shape == "0.5b",
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write(directory: Path, config: LlamaConfig) -> int:
    """Write the checkpoint, one file for each layer; returns its bytes."""
    directory.mkdir()
    config.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"w": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)
    groups = list(_groups(config))
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(group, name)
        total += _write_file(directory / name, group)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _groups(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each file."""
    state = {name: tuple(value.shape) for name, value in meta_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    outside = {name: shape for name, shape in state.items() if ".layers." not in name}
    yield outside
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        yield {name: shape for name, shape in state.items() if name.startswith(start)}


def _write_file(path: Path, group: dict[str, tuple[int, ...]]) -> int:
    header, end, ones = {}, 0, []
    for name, shape in sorted(group.items()):
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
        if "norm" in name:
            ones.append((end, shape[0]))
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data = file.tell()
        for start, count in ones:
            file.seek(data + start)
            file.write(b"\x80\x3f" * count)  # 1 in bfloat16
        file.truncate(data + end)
    return end


def main() -> None:
    """Write the checkpoint and say how large it seems and is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model of that size has")
    arguments = parser.parse_args()
    total = write(arguments.directory, config_of(arguments.shape, arguments.layers))
    real = sum(os.stat(path).st_blocks * 512 for path in arguments.directory.iterdir())
    print(f"{total / 1e9:.1f} GB, of which {real / 1e6:.1f} MB lie on the disk")


if __name__ == "__main__":
    main()
