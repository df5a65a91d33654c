"""The weights of a checkpoint directory: find the file of each tensor, and check the index."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import load_json
from simdiff.io.links import check_inside
from simdiff.io.safetensors_header import StoredTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONVERT = (
    "pickles are not read, because loading one runs the code in it; if you trust it, convert it "
    "once: AutoModelForCausalLM.from_pretrained({directory!r}).save_pretrained(NEW), copy the "
    "tokenizer's files beside it, and prune NEW"
)


@dataclass(frozen=True)
class StoredWeights:
    """All tensors of a checkpoint and the files that hold them."""

    directory: Path
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    metadata: dict[str, str]
    """Metadata of all files' headers together."""


def has_safetensors(directory: Path) -> bool:
    """Whether a directory holds safetensors files that `read_weights` can read."""
    return (directory / SINGLE).exists() or (directory / INDEX).exists()


def read_weights(directory: Path) -> StoredWeights:
    """Read the headers of model.safetensors, or of all shards that the index names.

    Files may be symbolic links, as in the hub's cache; they are followed.

    Raises:
        SimdiffError: there is no safetensors checkpoint, a file is damaged, or the index disagrees
            with its shards.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise SimdiffError(
            f"{directory}: must hold one checkpoint, but holds {SINGLE} and {INDEX}: remove the "
            "one that is out of date"
        )
    if not single.exists() and not index.exists():
        raise _no_weights(directory)
    weight_map = _read_index(index) if index.exists() else None
    files = [single] if weight_map is None else _shards(index, weight_map)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        check_inside(file, directory)
        file_metadata, entries = read_header(file)
        metadata |= file_metadata
        for tensor in entries:
            if tensor.name in tensors:
                raise SimdiffError(
                    f"{directory}: every tensor must lie in one shard, but {tensor.name!r} lies in "
                    f"{tensors[tensor.name].path.name} and {file.name}: they belong to different "
                    "checkpoints; copy or download all shards again"
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(index, weight_map, tensors)
    if not tensors:
        raise SimdiffError(f"{directory}: the checkpoint must hold tensors, got none")
    return StoredWeights(directory, tensors, tuple(files), metadata)


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files of a directory's weights, and of their index."""
    names = [SINGLE, INDEX]
    if (directory / INDEX).is_file():
        names += sorted(set(_read_index(directory / INDEX).values()))
    return names


def _no_weights(directory: Path) -> SimdiffError:
    """Make the error that names the weights found instead, and says what to do."""
    if not directory.is_dir():
        return SimdiffError(f"{directory}: must be a directory with a checkpoint, and is not one")
    here = f"{directory}: must hold {SINGLE}, or shards and {INDEX}"
    if any(_SHARD.fullmatch(path.name) for path in directory.glob("model-*.safetensors")):
        return SimdiffError(f"{here}, but holds shards without their index: copy or download it")
    dangling = [path for path in (directory / SINGLE, directory / INDEX) if path.is_symlink()]
    if dangling:
        return SimdiffError(
            f"{dangling[0]}: must be a file, but is a link to {dangling[0].readlink()}, which does "
            "not exist: download the checkpoint again"
        )
    if (directory / "adapter_model.safetensors").exists():
        return SimdiffError(
            f"{here}, but holds a LoRA adapter: merge it into its base model first "
            "(peft: merge_and_unload, save_pretrained)"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return SimdiffError(
            f"{here}, but its weights are called {', '.join(others[:3])}: rename a single file to "
            f"{SINGLE} if transformers can load it"
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return SimdiffError(
            f"{here}, but holds {', '.join(pickles[:3])}: "
            + _CONVERT.format(directory=str(directory))
        )
    return SimdiffError(f"{here}, and holds neither")


def _read_index(index: Path) -> dict[str, str]:
    check_inside(index, index.parent)
    content = load_json(index)
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise SimdiffError(f"{index}: must have a weight_map from tensors to files, got none")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SimdiffError(
                f"{index}: must name safetensors files of its own directory, got {shard!r:.200}"
            )
    return weight_map


def _shards(index: Path, weight_map: dict[str, str]) -> list[Path]:
    """The shards named by the index; checks that all exist and no others."""
    named = sorted(set(weight_map.values()))
    missing = [shard for shard in named if not (index.parent / shard).exists()]
    if missing:
        raise SimdiffError(
            f"{index}: names {len(named)} shards, but {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''} cannot be found: download the rest of "
            "the checkpoint"
        )
    strangers = sorted(
        path.name
        for path in index.parent.glob("model-*.safetensors")
        if _SHARD.fullmatch(path.name) and path.name not in named
    )
    if strangers:
        raise SimdiffError(
            f"{index}: must name all shards of its directory, but not {', '.join(strangers[:3])}: "
            "remove what an earlier save left, or restore the index that belongs to it"
        )
    return [index.parent / shard for shard in named]


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    """Check that every tensor is in the file that the index names, and that none is missing."""
    for name, tensor in tensors.items():
        said = weight_map.get(name)
        if said != tensor.path.name:
            where = "does not name it" if said is None else f"says {said}"
            raise SimdiffError(
                f"{index}: tensor {name!r} lies in {tensor.path.name}, but the index {where}: "
                "index and shards belong to different checkpoints; copy or download both again"
            )
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise SimdiffError(
            f"{index}: says that {lost[0]!r} lies in {weight_map[lost[0]]}, but that file does not "
            f"have it ({len(lost)} such tensors): copy or download the checkpoint again"
        )
