"""A look at a model's files before anything is loaded: what they are, and whether all is there.

Every message says what was found and what to do with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError, nearest_path

_LFS = b"version https://git-lfs"
_LARGEST_POINTER = 1024
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_OFTEN_LFS = (*_WEIGHTS, ".json", ".model", ".gguf", ".tiktoken")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

GGUF_USE = (
    "simdiff cuts it with a plan (simdiff prune FILE.gguf --plan plan.json) and does nothing else "
    "with it: score and evaluate the model that it was made from, and take that plan"
)
ADAPTER_USE = (
    "merge it into its base model (peft: PeftModel.from_pretrained(base, adapter)"
    ".merge_and_unload().save_pretrained(NEW)), copy the tokenizer beside it, and give NEW"
)


def check_name(name: str) -> None:
    """Refuse the name of a model that can be neither a path that is there nor a hub name.

    Raises:
        SimdiffError: there is no such directory; names the one that may be meant.
    """
    if not name:
        raise SimdiffError("model: must be a directory, a hub name or 'demo', got an empty name")
    path = Path(name)
    if path.exists():
        return
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    if is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        what = "no such file" if path.suffix == ".gguf" else "no such directory"
        raise SimdiffError(f"model {name}: {what}{nearest_path(path)}")


_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def stored_depth(name: str) -> int | None:
    """How many layers the config.json of a directory says that its model has, if it says so."""
    try:
        content = json.loads(Path(name, "config.json").read_bytes())
        parts = (content.get("text_config") or {}, content)
        found = [part[key] for part in parts for key in _DEPTHS if isinstance(part.get(key), int)]
    except (OSError, ValueError, AttributeError):
        return None
    return found[0] if found else None


def is_gguf_file(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes or else by its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"


def check_kind(path: Path) -> None:
    """Refuse what is no checkpoint of transformers, and files that are only pointers to others.

    Args:
        path: an existing file or directory.

    Raises:
        SimdiffError: a GGUF file, an adapter, another format, or a Git LFS pointer.
    """
    if path.is_file():
        if is_gguf_file(path):
            raise SimdiffError(f"{path}: is a GGUF file: {GGUF_USE}")
        raise SimdiffError(
            f"{path}: is a file, and a model is a directory with config.json, weights and "
            f"tokenizer: give the directory that holds it, such as {path.parent}"
        )
    files = {file.name for file in path.iterdir()}
    for name in sorted(files):
        if name.endswith(_OFTEN_LFS) and _is_pointer(path / name):
            raise SimdiffError(
                f"{path / name}: is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                f"{path}, or download it again"
            )
    if "config.json" in files:
        if "adapter_config.json" in files:
            raise SimdiffError(
                f"{path}: holds an adapter beside its model ({_base(path)}): {ADAPTER_USE}; or "
                "move adapter_config.json away to take the model without it"
            )
        return
    raise SimdiffError(f"{path}: {_without_config(path, files)}")


def _without_config(path: Path, files: set[str]) -> str:
    """What a directory without config.json is, and what to do."""
    if "adapter_config.json" in files:
        return f"is an adapter ({_base(path)}), not a model: {ADAPTER_USE}"
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if ggufs:
        return f"holds no config.json, but a GGUF file ({ggufs[0]}): {GGUF_USE}"
    if "model_index.json" in files:
        return "is a diffusion pipeline, which simdiff does not take: give a language model"
    if files & {"params.json", "consolidated.safetensors", "consolidated.00.pth"}:
        return (
            "holds no config.json, but weights in their maker's own format (params.json, "
            "consolidated.*): take the version for transformers"
        )
    if any(name.startswith("global_step") for name in files) or "zero_to_fp32.py" in files:
        return (
            "holds no config.json, but the state of a training (DeepSpeed): gather it with "
            "zero_to_fp32.py and save it with save_pretrained"
        )
    inside = sorted(str(found.parent) for found in path.glob("*/config.json"))
    if inside:
        return f"holds no config.json: give one of {', '.join(inside[-3:])}"
    return "holds no config.json: give the directory of a transformers checkpoint"


def adapter_base(path: Path) -> str | None:
    """The name of the base model in an adapter's config; None if there is none."""
    try:
        content = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        return str(content["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _base(path: Path) -> str:
    base = adapter_base(path)
    return f"of {base}" if base else "adapter_config.json"


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _LARGEST_POINTER:
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        SimdiffError: it is missing, or is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise SimdiffError(f"{directory}: must hold config.json, and does not")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SimdiffError(f"{path}: must be JSON, but is not: {error}") from None
    if not isinstance(content, dict):
        raise SimdiffError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


def check_weights(directory: Path) -> None:
    """Refuse weights that are missing or not whole; only the headers of safetensors are read.

    Raises:
        SimdiffError: names the file and what to do.
    """
    for path in weight_files(directory):
        if path.is_symlink() and not path.exists():
            raise SimdiffError(
                f"{path}: is a link to {path.readlink()}, which does not exist: download the "
                "checkpoint again"
            )
        if not path.exists():
            raise SimdiffError(
                f"{directory / _INDEX}: names {path.name}, which is not there: download the rest "
                "of the checkpoint"
            )
        if path.stat().st_size == 0:
            raise SimdiffError(f"{path}: is empty: copy or download it again")
        if path.suffix == ".safetensors":
            _check_whole(path)


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers would load: shards of the index, one file, or pickles.

    Raises:
        SimdiffError: there are none, or their index is damaged.
    """
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    if (directory / _INDEX).is_file():
        try:
            content = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            return [directory / name for name in sorted(set(content["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SimdiffError(
                f"{directory / _INDEX}: must have a weight_map from tensors to files, and is "
                "damaged: download it again"
            ) from None
    found = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS)
    if not found:
        ggufs = sorted(directory.glob("*.gguf"))
        holds = f"a GGUF file ({ggufs[0].name}): {GGUF_USE}" if ggufs else "none"
        raise SimdiffError(
            f"{directory}: must hold weights (model.safetensors, or shards and their index), and "
            f"holds {holds}{'' if ggufs else ': download the rest of the checkpoint'}"
        )
    return found


def _check_whole(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise SimdiffError(
            f"{path}: is damaged or not whole ({' '.join(str(error).split())[:100]}): copy or "
            "download it again"
        ) from None


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether two identities are of the same weights; None where nothing tells.

    Args:
        one, other: of `simdiff.models.identity.model_identity`, or parts of results with their
            `weights`. Those of earlier versions have none.
    """
    first, second = (
        known if isinstance(known, dict) else {}
        for known in (one.get("weights"), other.get("weights"))
    )
    shared = first.keys() & second.keys()
    return any(first[key] == second[key] for key in shared) if shared else None
