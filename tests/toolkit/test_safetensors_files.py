"""Headers and indexes: what safetensors' own library writes and reads, and what it would refuse."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, load_file, save_file

from checkpoints import read_raw, write_raw
from simdiff.errors import SimdiffError
from simdiff.safetensors_files import (
    MAX_HEADER_BYTES,
    StoredTensor,
    file_order,
    header_bytes,
    read_header,
)
from simdiff.stored_weights import INDEX, read_weights
from simdiff.streaming import Shard, parse_size, split_shards, write_shards

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_every_dtype_as_the_library_has_it(tmp_path: Path) -> None:
    """Offsets, shapes and order of a file of all dtypes; our header is its header."""
    tensors = {
        f'{name}.é"\\\n{index}': torch.ones(index + 1, 3).to(dtype)
        for index, (name, dtype) in enumerate(_TYPES.items())
    }
    tensors |= {"empty": torch.ones(0, 4), "scalar": torch.tensor(1.5)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    metadata, entries = read_header(path)
    assert metadata == {"format": "pt"}
    assert {entry.name: entry.shape for entry in entries} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    raw = path.read_bytes()
    for entry in entries:
        wanted = tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert raw[entry.start : entry.start + entry.num_bytes] == wanted
    shuffled = sorted([(entry.name, entry) for entry in entries[::-1]], key=file_order)
    head, data_bytes = header_bytes(shuffled, metadata)
    assert raw.startswith(head)
    assert len(raw) == len(head) + data_bytes


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


BROKEN = [
    (b"", "at least 8 bytes, got 0"),
    (b"\x80\x02}", "at least 8 bytes, got 3"),
    (struct.pack("<Q", 1 << 62) + b"{}", "first 8 bytes say 4,611,686,018,427,387,904"),
    (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100,000,000"),
    (struct.pack("<Q", 100) + b"{}", "header must have 100 bytes, but the file ends after 2"),
    (struct.pack("<Q", 2) + b"{]", "must be JSON"),
    (struct.pack("<Q", 2) + b"\xff\xfe", "must be JSON"),
    (struct.pack("<Q", 2) + b"[]", "must be a JSON object, got list"),
]


@pytest.mark.parametrize(("content", "wanted"), BROKEN)
def test_damaged_files(content: bytes, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SimdiffError, match=wanted) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


BAD_ENTRIES = [
    ({"a": F32 | {"data_offsets": [0, 9]}}, 9, "must take 8 bytes .*span 9"),
    ({"a": F32 | {"shape": [-2]}}, 8, "whole numbers"),
    ({"a": F32 | {"shape": [2.0]}}, 8, "whole numbers"),
    ({"a": F32 | {"data_offsets": [8, 0]}}, 8, "span -8"),
    ({"a": {"dtype": "F32"}}, 8, "must have dtype, shape and data_offsets"),
    ({"a": 3}, 8, "must have dtype, shape and data_offsets"),
    ({"a": F32 | {"dtype": "F31"}}, 8, "one of the dtypes .*got 'F31'"),
    ({"a": F32, "b": F32}, 8, "'b' overlaps the tensor before it"),
    ({"a": F32 | {"data_offsets": [4, 12]}}, 12, "'a' follows a hole"),
    ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, 20, "'b' follows a hole.*byte 8.*got 12"),
    ({"a": F32}, 7, "truncated: its header says"),
    ({"a": F32}, 9, "too long: its header says"),
    ({"a": F32, "__metadata__": {"format": 3}}, 8, "__metadata__"),
    (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
     b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', 0, "names 'a' twice"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data_bytes", "wanted"), BAD_ENTRIES)
def test_headers_that_lie(header: object, data_bytes: int, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(data_bytes))
    with pytest.raises(SimdiffError, match=wanted) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if isinstance(header, dict):  # the library does not notice a name that comes twice
        with pytest.raises(SafetensorError), safe_open(path, "pt") as file:
            file.keys()


def two_shards(directory: Path) -> None:
    for index, names in enumerate((("a", "b"), ("c",))):
        save_file(
            {name: torch.full((2,), float(ord(name))) for name in names},
            directory / f"model-0000{index + 1}-of-00002.safetensors",
        )
    write_index(directory, {"a": 1, "b": 1, "c": 2})


def write_index(directory: Path, shards: dict[str, int]) -> None:
    weight_map = {n: f"model-0000{i}-of-00002.safetensors" for n, i in shards.items()}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    two_shards(tmp_path)
    weights = read_weights(tmp_path)
    assert sorted(weights.tensors) == ["a", "b", "c"]
    header, data = read_raw(weights.tensors["c"].path)
    tensor = weights.tensors["c"]
    assert weights.tensors["c"].path.read_bytes()[tensor.start :] == data
    assert header["c"]["shape"] == [2]


def test_links_are_followed_as_in_the_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    two_shards(blobs)
    for path in list(blobs.iterdir()):
        blob = path.rename(blobs / f"{abs(hash(path.name)):x}")
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / blob.name)
    assert sorted(read_weights(snapshot).tensors) == ["a", "b", "c"]
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    with pytest.raises(SimdiffError, match="model-00002-of-00002.safetensors cannot be found"):
        read_weights(snapshot)


SHARD_1, SHARD_2 = (f"model-0000{index}-of-00002.safetensors" for index in (1, 2))


def spoil(directory: Path, how: str) -> None:
    if how == "missing shard":
        (directory / SHARD_2).unlink()
    elif how == "other shard":
        write_index(directory, {"a": 1, "b": 2, "c": 2})
    elif how == "not in the index":
        write_index(directory, {"a": 1, "c": 2})
    elif how == "twice":
        save_file({"c": torch.ones(2), "a": torch.ones(2)}, directory / SHARD_2)
    elif how == "in no shard":
        write_index(directory, {"a": 1, "b": 1, "c": 2, "d": 2})
    elif how == "stranger":
        (directory / "model-00003-of-00003.safetensors").write_bytes(b"")
    elif how == "no index":
        (directory / INDEX).unlink()
    elif how == "index no JSON":
        (directory / INDEX).write_text('{"weight_map": {')
    elif how == "empty index":
        (directory / INDEX).write_text('{"weight_map": {}}')
    elif how == "outside":
        (directory / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    elif how == "two checkpoints":
        save_file({"a": torch.ones(2)}, directory / "model.safetensors")
    else:
        for path in (*directory.glob("*.safetensors"), directory / INDEX):
            path.unlink()
        if how != "nothing":
            (directory / how).write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("missing shard", f"{INDEX}: names 2 shards, but {SHARD_2} cannot be found: download"),
        ("other shard", f"'b' lies in {SHARD_1}, but the index says {SHARD_2}"),
        ("not in the index", f"'b' lies in {SHARD_1}, but the index does not name it"),
        ("twice", f"'a' lies in {SHARD_1} and {SHARD_2}"),
        ("in no shard", f"says that 'd' lies in {SHARD_2}, but that file does not have it"),
        ("stranger", "must name all shards .* not model-00003-of-00003.safetensors: remove"),
        ("no index", "holds shards without their index"),
        ("index no JSON", f"{INDEX}: must be JSON"),
        ("empty index", "must have a weight_map"),
        ("outside", "files of its own directory, got '../model.safetensors'"),
        ("two checkpoints", "must hold one checkpoint, but holds model.safetensors and"),
        ("pytorch_model.bin", "holds pytorch_model.bin: pickles are not read.*save_pretrained"),
        ("adapter_model.safetensors", "LoRA adapter: merge it"),
        ("consolidated.safetensors", "weights are called consolidated.safetensors"),
        ("nothing", "and holds neither"),
    ],
)
def test_directories_that_disagree(how: str, wanted: str, tmp_path: Path) -> None:
    two_shards(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(SimdiffError, match=wanted) as caught:
        read_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)


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
