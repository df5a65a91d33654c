"""GGUF files of random data, and what the gguf package reads in them."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from simdiff.checkpoints.gguf.container import GgufFile, align, file_header, tensor_record

Setup = Callable[[GGUFWriter, str], None]


def write_gguf(
    path: Path,
    setup: Setup | None = None,
    *,
    architecture: str = "llama",
    num_blocks: int = 6,
    tensors: Callable[[int], dict[str, GGMLQuantizationType]] | None = None,
    extra: Sequence[str] = (),
    **options: Any,
) -> Path:
    """A file with random blocks of quantised data; runtimes would not run it."""
    writer = GGUFWriter(path, architecture, **options)
    writer.add_block_count(num_blocks)
    writer.add_embedding_length(256)
    if setup is not None:
        setup(writer, architecture)
    random = np.random.default_rng(0)

    def add(name: str, kind: GGMLQuantizationType) -> None:
        block, size = GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (3, 256 // block * size), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", GGMLQuantizationType.Q6_K)
    for block in range(num_blocks):
        of_block = tensors(block) if tensors else {"attn_q.weight": GGMLQuantizationType.Q4_0}
        for name, kind in {"attn_norm.weight": GGMLQuantizationType.BF16, **of_block}.items():
            add(f"blk.{block}.{name}", kind)
    for name in ("output_norm.weight", *extra):
        add(name, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> GGUFReader:
    """What the gguf package reads; it takes seconds where there is a vocabulary."""
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, _: int) -> GGUFReader:
    return GGUFReader(path)


def content(path: Path) -> dict[str, Any]:
    return {
        name: (field.types, field.contents())
        for name, field in read(path).fields.items()
        if not name.startswith("GGUF.")
    }


def check_tensors(cut: Path, sources: Sequence[Path], kept: Sequence[int]) -> None:
    """Every tensor is there once, under its new number, bit for bit, aligned."""
    wanted = {}
    for source in sources:
        for tensor in read(source).tensors:
            name = tensor.name
            if match := re.fullmatch(r"blk\.(\d+)\.(.*)", name):
                if int(match[1]) not in kept:
                    continue
                name = f"blk.{list(kept).index(int(match[1]))}.{match[2]}"
            wanted[name] = tensor
    reader = read(cut)
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(wanted)
    for tensor in reader.tensors:
        original = wanted[tensor.name]
        assert tensor.tensor_type == original.tensor_type
        assert tensor.shape.tolist() == original.shape.tolist()
        assert np.array_equal(tensor.data.view(np.uint8), original.data.view(np.uint8))
        assert tensor.data_offset % reader.alignment == 0


def write_runnable(path: Path, architecture: str, blocks: Sequence[int]) -> Path:
    """A float model that llama.cpp runs, of some of six random blocks that differ in shape."""
    random, width, heads, kv_heads = np.random.default_rng(0), 64, [4] * 6, [2] * 6
    forward, sliding = [96] * 6, [True, True, False, True, False, True]
    norms: dict[str, tuple[int, ...]] = {
        "attn_q_norm": (16,),
        "attn_k_norm": (16,),
        "post_attention_norm": (width,),
        "post_ffw_norm": (width,),
    }
    writer = GGUFWriter(path, architecture)
    if architecture == "deci":
        heads, kv_heads = [4, 4, 2, 4, 2, 2], [4, 2, 2, 1, 2, 1]
        forward, norms = [96, 128, 64, 96, 128, 64], {}
    else:
        writer.add_sliding_window(4)
        writer.add_sliding_window_pattern([sliding[block] for block in blocks])
    writer.add_block_count(len(blocks))
    writer.add_head_count([heads[block] for block in blocks])
    writer.add_head_count_kv([kv_heads[block] for block in blocks])
    writer.add_feed_forward_length([forward[block] for block in blocks])
    for add, value in (
        (writer.add_embedding_length, width),
        (writer.add_context_length, 128),
        (writer.add_vocab_size, 97),
        (writer.add_key_length, 16),
        (writer.add_value_length, 16),
        (writer.add_rope_dimension_count, 16),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    writer.add_tokenizer_model("none")

    def add_tensor(name: str | None, *shape: int) -> None:
        data = (random.standard_normal(shape) / 8).astype(np.float32)
        if name is not None:
            writer.add_tensor(f"{name}.weight", data)

    add_tensor("token_embd", 97, width)
    add_tensor("output_norm", width)
    add_tensor("output", 97, width)
    for block in range(6):
        shapes = {
            "attn_norm": (width,),
            "ffn_norm": (width,),
            **norms,
            "attn_q": (16 * heads[block], width),
            "attn_output": (width, 16 * heads[block]),
            "attn_k": (16 * kv_heads[block], width),
            "attn_v": (16 * kv_heads[block], width),
            "ffn_gate": (forward[block], width),
            "ffn_up": (forward[block], width),
            "ffn_down": (width, forward[block]),
        }
        for name, shape in shapes.items():
            kept = block in blocks
            add_tensor(f"blk.{blocks.index(block)}.{name}" if kept else None, *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_entry(gguf: GgufFile, key: str, value: bytes) -> bytes:
    """The file with an entry of this key, whose value is the number of its type and its bytes."""
    name = key.encode()
    entries = [gguf.raw(entry) for entry in gguf.entries.values() if entry.key != key]
    entries.append(struct.pack("<Q", len(name)) + name + value)
    data = min(tensor.offset for tensor in gguf.tensors)
    records = [tensor_record(t, t.name, t.offset - data) for t in gguf.tensors]
    head = file_header(3, len(records), len(entries)) + b"".join(entries + records)
    return head + bytes(align(len(head), gguf.alignment) - len(head)) + gguf.mapped[data:]


# What an entry should not be: the number of the type, and the value.
ODD_ENTRIES = (
    struct.pack("<IQ", 8, 1) + b"x",
    struct.pack("<IQ", 8, 1 << 63),
    struct.pack("<If", 6, math.nan),
    struct.pack("<Id", 12, 1e308),
    struct.pack("<Ii", 5, -3),
    struct.pack("<II", 4, 0),
    struct.pack("<II", 4, 12),
    struct.pack("<IQ", 10, (1 << 63) + 5),
    struct.pack("<I?", 7, True),
    struct.pack("<IIQiii", 9, 5, 3, 0, 1, 2),
    struct.pack("<IIQQQ", 9, 8, 2, 0, (1 << 63) - 1),
    struct.pack("<IIQIQIQ", 9, 9, 2, 9, 0, 4, 0),
    struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
    struct.pack("<I", 77),
)
