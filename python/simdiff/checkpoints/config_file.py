"""The config.json of a cut checkpoint: the source's, but for the entries that the cut changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from simdiff.checkpoints.quantiser import QUANTISER_ENTRIES, Modules, carry_over
from simdiff.errors import SimdiffError
from simdiff.io.json_files import load_json
from simdiff.io.links import check_inside
from simdiff.surgery.config_entries import Depth
from simdiff.surgery.config_patch import patched_config, text_entries

CONFIG_FILE = "config.json"
Entries = dict[str, Any]


def read_entries(source: Path) -> Entries:
    """The content of a checkpoint's config.json.

    Raises:
        SimdiffError: it is missing, no JSON object, or a link out of the directory.
    """
    path = source / CONFIG_FILE
    if not path.is_file():
        raise SimdiffError(f"{source}: must hold config.json, and does not")
    check_inside(path, source)
    content = load_json(path)
    if not isinstance(content, dict):
        raise SimdiffError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


def cut_file(
    source: Path,
    before: PreTrainedConfig,
    wanted: PreTrainedConfig,
    depth: Depth,
    architecture: str,
) -> Entries:
    """The source's entries, changed so that its stock class reads another config from them.

    Args:
        source: directory of the dense checkpoint.
        before: the config of that checkpoint.
        wanted: the config after the cut.
        depth: the cut.
        architecture: name of the model's class, where the source does not say it.
    """
    entries = patched_config(read_entries(source), before, wanted, depth)
    entries.pop("transformers_weights", None)  # the name of a file that is not copied
    if not entries.get("architectures"):
        entries["architectures"] = [architecture]
    return entries


def carry_quantiser(
    entries: Entries, config: PreTrainedConfig, modules: Modules, where: str
) -> list[str]:
    """Carry the quantiser's entries over to the cut model, in place; return the changed keys."""
    changes = []
    for part in _parts(entries, config):
        for name in QUANTISER_ENTRIES:
            found = part.get(name)
            if isinstance(found, dict) and found:
                new = part[name] = carry_over(found, modules, f"{where}: {name}")
                changes += [f"{name}.{key}" for key in found if new.get(key) != found[key]]
    return list(dict.fromkeys(changes))


def drop_quantiser(entries: Entries, config: PreTrainedConfig) -> None:
    """Remove the quantiser's entries, in place: the weights are plain now."""
    for part in _parts(entries, config):
        for name in QUANTISER_ENTRIES:
            part.pop(name, None)


def _parts(entries: Entries, config: PreTrainedConfig) -> list[Entries]:
    text = text_entries(entries, config)
    return [entries] if text is entries else [entries, text]


def config_bytes(entries: Entries, source: Path) -> bytes:
    """The text of a config.json, indented and escaped like that of the source."""
    text = (source / CONFIG_FILE).read_text(encoding="utf-8")
    indent = re.match(r"\s*\{\s*\n([ \t]+)", text)
    new = json.dumps(entries, indent=indent[1] if indent else 2, ensure_ascii=text.isascii())
    return (new + "\n" * text.endswith("\n")).encode()
