"""The other files of a checkpoint (tokenizer, templates, licence): which are copied to the pruned
one and which are left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from simdiff.checkpoints.tensor_names import LayerNumbers, renumber_names
from simdiff.errors import SimdiffError
from simdiff.io.outputs import CONFIG, PLAN_FILE

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
_QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@dataclass(frozen=True)
class OtherFiles:
    """The entries of a checkpoint's directory other than the weights."""

    copied: tuple[Path, ...]
    """Files that are copied, relative to the directory."""
    left_behind: dict[str, str]
    """Reason why each of the other entries is left behind."""


def sort_other_files(directory: Path, weights: Collection[str]) -> OtherFiles:
    """Sort the other files of a checkpoint into those to copy and those to leave behind.

    Args:
        directory: directory of the checkpoint.
        weights: names of the weight files, which are pruned.

    Raises:
        SimdiffError: a file to copy is a broken link.
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
            files = [path for path in sorted(entry.rglob("*")) if path.is_file()]
            code = any(path.suffix == ".py" for path in files)
            wanted = [path for path in files if _is_copied(path.name)]
            if (entry.name in _COPIED_FOLDERS or code) and len(wanted) == len(files):
                copied += [path.relative_to(directory) for path in wanted]
            else:
                left_behind[entry.name] = "a folder of unknown purpose"
        elif _is_copied(entry.name):
            if not entry.exists():
                raise SimdiffError(
                    f"{entry}: must be a file, but is a link to {entry.readlink()}, which does not "
                    "exist: download the checkpoint again"
                )
            copied.append(Path(entry.name))
        else:
            left_behind[entry.name] = "of unknown purpose"
    return OtherFiles(tuple(copied), left_behind)


def _is_copied(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _COPIED)


def copy_other_files(others: OtherFiles, source: Path, target: Path, layers: LayerNumbers) -> None:
    """Copy the other files; follow links and renumber layers in the files of quantisers.

    Raises:
        SimdiffError: the file of a quantiser is not JSON, or cannot be renumbered.
    """
    for path in others.copied:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.name in _QUANTISERS:
                content = json.loads((source / path).read_text(encoding="utf-8"))
                renamed = renumber_names(content, layers, str(source / path))
                text = json.dumps(renamed, indent=2, ensure_ascii=False) + "\n"
                (target / path).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(source / path, target / path)
        except ValueError as error:
            if isinstance(error, SimdiffError):
                raise
            raise SimdiffError(f"{source / path}: must be JSON, but is not: {error}") from None
