"""The other files of a checkpoint (tokenizer, templates, licence): which are copied to the pruned
one and which are left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from simdiff.checkpoints.quantiser import Modules, carry_over
from simdiff.errors import SimdiffError
from simdiff.io.json_files import load_json
from simdiff.io.kinds import CONFIG, PLAN_FILE
from simdiff.io.links import check_inside, named_file

# Files that are copied: tokenizers, chat templates, processors, generation config, code, licences.
_COPIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
_COPIED_FOLDERS = ("additional_chat_templates",)
# Files that are left behind; the first match gives the reason.
_LEFT_BEHIND = (
    ("config.json", None),  # written by the cut
    (PLAN_FILE, None),
    (CONFIG, "repeats the command that wrote it"),
    ("optimizer*", "state of a training"),
    ("scheduler.*", "state of a training"),
    ("rng_state*", "state of a training"),
    ("scaler.*", "state of a training"),
    ("trainer_state.json", "state of a training"),
    ("training_args.bin", "state of a training"),
    ("global_step*", "state of a training"),
    ("latest", "state of a training"),
    ("checkpoint-*", "state of a training"),
    ("all_results.json", "results of the whole model"),
    ("*_results.json", "results of the whole model"),
    ("*.index.json", "index of other weights"),
    ("params.json", "config of the original format, whole model"),
    ("README*", "describes the whole model"),
    ("*.safetensors", "other weights"),
    ("*.bin", "weights in another format"),
    ("*.pt", "weights in another format"),
    ("*.pth", "weights in another format"),
    ("*.ckpt", "weights in another format"),
    ("*.pkl", "weights in another format"),
    ("*.h5", "weights in another format"),
    ("*.msgpack", "weights in another format"),
    ("*.gguf", "weights in another format"),
    ("*.onnx*", "weights in another format"),
    ("original", "weights in another format"),
    ("onnx", "weights in another format"),
    (".*", "of the download, not of the model"),
)
# Files of quantisers, in which layers are named.
QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_OF_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)
_UNKNOWN, _UNKNOWN_FOLDER = "of unknown purpose", "a folder of unknown purpose"
# Larger JSON files are vocabularies; they name no files.
_LISTS_FILES = 1 << 20


@dataclass(frozen=True)
class OtherFiles:
    """The entries of a checkpoint's directory other than the weights."""

    copied: tuple[Path, ...]
    """Files that are copied, relative to the directory."""
    left_behind: dict[str, str]
    """Reason why each of the other entries is left behind."""


def sort_other_files(directory: Path, weights: Collection[str]) -> OtherFiles:
    """Sort the other files of a checkpoint into those to copy and those to leave behind.

    Files and folders that a copied JSON file names (the modules of sentence-transformers, say) are
    copied too, whatever they are called.

    Args:
        directory: directory of the checkpoint.
        weights: names of the weight files, which are pruned.

    Raises:
        SimdiffError: a file to copy is a broken link, or leads out of the directory.
    """
    copied: list[Path] = []
    left_behind: dict[str, str] = {}
    for entry in sorted(directory.iterdir()):
        if entry.name in weights:
            continue
        matches = [reason for pattern, reason in _LEFT_BEHIND if fnmatch(entry.name, pattern)]
        if matches:
            if matches[0] is not None:
                left_behind[entry.name] = matches[0]
        elif entry.is_dir():
            files = _files_of(entry)
            code = any(path.suffix == ".py" for path in files)
            wanted = [path for path in files if _is_copied(path.name)]
            if (entry.name in _COPIED_FOLDERS or code) and len(wanted) == len(files):
                copied += [path.relative_to(directory) for path in wanted]
            else:
                left_behind[entry.name] = _UNKNOWN_FOLDER
        elif _is_copied(entry.name):
            copied.append(Path(entry.name))
        else:
            left_behind[entry.name] = _UNKNOWN
    copied += _named(directory, copied, left_behind)
    for path in copied:
        entry = directory / path
        if not entry.exists():
            raise SimdiffError(
                f"{entry}: must be a file, but is a link to {entry.readlink()}, which does not "
                "exist: download the checkpoint again"
            )
        check_inside(entry, directory)
    return OtherFiles(tuple(copied), left_behind)


def _files_of(folder: Path) -> list[Path]:
    """All files below a folder; folders that are links are not entered."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]


def _named(directory: Path, copied: Iterable[Path], left_behind: dict[str, str]) -> list[Path]:
    """The files that copied JSON files name, and that would be left behind as unknown."""
    found: dict[Path, None] = {}
    queue = [path for path in copied if path.suffix == ".json"]
    while queue:
        path = queue.pop(0)
        check_inside(directory / path, directory)
        if not (directory / path).is_file() or (directory / path).stat().st_size > _LISTS_FILES:
            continue
        try:
            content = load_json(directory / path)
        except SimdiffError:
            continue  # copied as it is, whatever it is
        for text in _texts(content):
            named = named_file(directory, text)
            if named is None or left_behind.get(named.parts[0]) not in (_UNKNOWN, _UNKNOWN_FOLDER):
                continue
            whole = directory / named
            files = _files_of(whole) if whole.is_dir() else [whole]
            new = [f.relative_to(directory) for f in files if f.relative_to(directory) not in found]
            found |= dict.fromkeys(new)
            queue += [file for file in new if file.suffix == ".json"]
    for name in {path.parts[0] for path in found}:
        if all(file.relative_to(directory) in found for file in _files_of(directory / name)):
            left_behind.pop(name, None)
    return list(found)


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _is_copied(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _COPIED)


def tokenizer_files(names: Iterable[Path]) -> list[Path]:
    """Those of a checkpoint's files that are of its tokenizer, templates included."""
    return [path for path in names if any(fnmatch(str(path), p) for p in _OF_TOKENIZER)]


def copy_other_files(others: OtherFiles, source: Path, target: Path, modules: Modules) -> None:
    """Copy the other files, links followed; layers that a quantiser's file names are carried over.

    Raises:
        SimdiffError: the file of a quantiser is not JSON, or cannot be carried over.
    """
    for path in others.copied:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if path.name in QUANTISERS:
            content = carry_over(load_json(source / path), modules, str(source / path))
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (target / path).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source / path, target / path)
