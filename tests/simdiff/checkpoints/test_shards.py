"""Shards: split as the hub's library does, written as safetensors does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdiff.checkpoints.shards import Shard, parse_size, split_shards, write_shards
from simdiff.errors import SimdiffError
from simdiff.io.safetensors_header import StoredTensor, read_header


def test_written_files_are_those_of_the_library(tmp_path: Path) -> None:
    """Tensors of two files, renamed into one: the bytes that save_file gives."""
    parts = [
        {"b": torch.randn(700, 1000), "a": torch.arange(7, dtype=torch.int8)},
        {"c": torch.randn(5, 3).bfloat16(), "d": torch.zeros(0)},
    ]
    named = []
    for index, part in enumerate(parts):
        save_file(part, tmp_path / f"{index}.safetensors", metadata={"format": "pt"})
        entries = read_header(tmp_path / f"{index}.safetensors")[1]
        named += [(f"new.{entry.name}", entry) for entry in entries]
    (tmp_path / "out").mkdir()
    shards = split_shards([[entry] for entry in named], 10**9)
    write_shards(shards, tmp_path / "out", {"format": "pt"})
    wanted = {f"new.{name}": tensor for part in parts for name, tensor in part.items()}
    save_file(wanted, tmp_path / "wanted", metadata={"format": "pt"})
    ours = tmp_path / "out" / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "wanted").read_bytes()
    loaded = load_file(ours)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.randn(1000)}, tmp_path / "a.safetensors")
    entry = read_header(tmp_path / "a.safetensors")[1][0]
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(entry.start + 100)
    with pytest.raises(SimdiffError, match="became shorter while it was read"):
        write_shards([Shard("x.safetensors", (("a", entry),))], tmp_path, {})


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5kb", 1500), (300, 300), ("2 TB", 2 * 10**12)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5GiB", "many"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(SimdiffError, match="bytes or such as 5GB"):
        parse_size(text)


@pytest.mark.parametrize("limit", [1, 40, 64, 100, 1000])
def test_shards_are_those_of_the_hub_library(limit: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = (8, 64, 16, 80, 8, 8, 40, 24)
    state = {f"t{index}": torch.zeros(size // 4) for index, size in enumerate(sizes)}
    entries = [
        (name, StoredTensor(name, "F32", tuple(t.shape), Path("x"), 0, t.numel() * 4))
        for name, t in state.items()
    ]
    wanted = split_torch_state_dict_into_shards(state, max_shard_size=limit).filename_to_tensors
    ours = split_shards([[entry] for entry in entries], limit)
    assert {shard.name: sorted(name for name, _ in shard.tensors) for shard in ours} == {
        name: sorted(tensors) for name, tensors in wanted.items()
    }
