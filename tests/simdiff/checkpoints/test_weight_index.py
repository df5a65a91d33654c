"""Where every tensor lies: indexes, links, and directories that disagree with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simdiff.checkpoints.weight_index import INDEX, read_weights
from simdiff.errors import SimdiffError
from support.checkpoints import read_raw


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
    repository = tmp_path / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    two_shards(blobs)
    for path in list(blobs.iterdir()):
        blob = path.rename(blobs / f"{abs(hash(path.name)):x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
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
    elif how == "deep index":
        (directory / INDEX).write_text("[" * 200_000)
    elif how == "link outside":
        moved = (directory / SHARD_2).rename(directory.with_name("elsewhere.safetensors"))
        (directory / SHARD_2).symlink_to(moved)
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
        ("deep index", f"{INDEX}: must be JSON, but is not: it is nested too deeply"),
        ("link outside", f"{SHARD_2}: must lie in .*, but is a link to .*elsewhere.safetensors"),
        ("two checkpoints", "must hold one checkpoint, but holds model.safetensors and"),
        ("pytorch_model.bin", "holds pytorch_model.bin: pickles are not read.*save_pretrained"),
        ("adapter_model.safetensors", "LoRA adapter: merge it"),
        ("consolidated.safetensors", "weights are called consolidated.safetensors"),
        ("nothing", "and holds neither"),
    ],
)
def test_directories_that_disagree(how: str, wanted: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    two_shards(directory)
    spoil(directory, how)
    with pytest.raises(SimdiffError, match=wanted) as caught:
        read_weights(directory)
    assert str(directory) in str(caught.value)
