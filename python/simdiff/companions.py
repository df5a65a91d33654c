"""What lies in a checkpoint beside its weights: what a pruned copy takes along, and what not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from simdiff.errors import SimdiffError
from simdiff.files import MARKER
from simdiff.layer_names import LayerNumbers, renumber_names

# Tokenizers, chat templates, processors, generation config, code, licences.
_TAKEN = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.bpe", "*.codes",
          "*.py", "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*")  # fmt: skip
_TAKEN_FOLDERS = ("additional_chat_templates",)
# First match tells why something is left behind.
_LEFT = (
    ("config.json", None),  # written anew
    (MARKER, None),
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
# Files of quantisers that name layers.
_QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@dataclass(frozen=True)
class Companions:
    """Entries of a checkpoint's directory beside the weights."""

    taken: tuple[Path, ...]
    """Files, relative to the directory."""
    left: dict[str, str]
    """Entry to the reason why it stays behind."""


def sort_companions(directory: Path, weights: Collection[str]) -> Companions:
    """Tell what goes along from what belongs to the whole model only.

    Args:
        directory: of the checkpoint.
        weights: names of the files that are pruned themselves.

    Raises:
        SimdiffError: a file that would go along is a link to nothing.
    """
    taken: list[Path] = []
    left: dict[str, str] = {}
    for entry in sorted(directory.iterdir()):
        if entry.name in weights:
            continue
        matches = [reason for pattern, reason in _LEFT if fnmatch(entry.name, pattern)]
        if matches:
            if matches[0] is not None:
                left[entry.name] = matches[0]
        elif entry.is_dir():
            files = [path for path in sorted(entry.rglob("*")) if path.is_file()]
            code = any(path.suffix == ".py" for path in files)
            wanted = [path for path in files if _is_taken(path.name)]
            if (entry.name in _TAKEN_FOLDERS or code) and len(wanted) == len(files):
                taken += [path.relative_to(directory) for path in wanted]
            else:
                left[entry.name] = "a folder of unknown purpose"
        elif _is_taken(entry.name):
            if not entry.exists():
                raise SimdiffError(
                    f"{entry}: must be a file, but is a link to {entry.readlink()}, which does not "
                    "exist: download the checkpoint again"
                )
            taken.append(Path(entry.name))
        else:
            left[entry.name] = "of unknown purpose"
    return Companions(tuple(taken), left)


def _is_taken(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _TAKEN)


def copy_companions(
    companions: Companions, source: Path, target: Path, layers: LayerNumbers
) -> None:
    """Copy what goes along; links are followed, layer names of quantisers renumbered.

    Raises:
        SimdiffError: a quantiser's file is no JSON, or cannot be renumbered.
    """
    for path in companions.taken:
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
