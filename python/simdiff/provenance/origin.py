"""Find the origin of a pruned model for its card: base model, licence and language."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from simdiff.data.demo import DEMO, demo_model
from simdiff.planning.plan import PruningPlan

CARD = "README.md"
# Metadata in the demo model's file (general.license, general.organization).
_DEMO_SOURCE = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "language": ["en"],
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# Beginnings of licence files, and the hub's names of the licences.
_LICENCES = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License|Permission is hereby granted, free of charge", "mit"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"BSD 3-Clause", "bsd-3-clause"),
)
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def source_folder(source: str | Path) -> Path | None:
    """The directory of a model's files: `source` itself, or the snapshot of a hub name.

    The card and the licence of a hub name are downloaded if possible, since loading a model does
    not download them.
    """
    if source == DEMO:
        return demo_model()
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file

    found = None
    for name in ("config.json", CARD, *_LICENCE_FILES, "NOTICE"):
        try:
            file = cached_file(str(source), name)
        except (OSError, ValueError):  # the file or the name does not exist, or there is no network
            continue
        found = Path(file).parent if file and found is None else found
    return found


def source_metadata(plan: PruningPlan, source_directory: Path | None) -> dict[str, Any]:
    """The metadata header of the card: licence and language from the source's card, and our own."""
    name = str(plan.model.get("name") or "")
    theirs = _front_matter(source_directory)
    if name == DEMO:
        theirs = {**_DEMO_SOURCE, **theirs}
    elif _HUB_NAME.fullmatch(name) and not Path(name).exists():
        theirs["base_model"] = name
    else:  # a local model: its own card names the model that it was made from
        theirs["base_model"] = _origin(source_directory)
    metadata: dict[str, Any] = {"library_name": "transformers"}
    if theirs.get("base_model"):
        metadata["base_model"] = theirs["base_model"]
        # The hub knows finetune, merge, quantized and adapter; changed weights are a finetune.
        metadata["base_model_relation"] = "finetune"
    licence = {
        key: theirs[key]
        for key in ("license", "license_name", "license_link")
        if isinstance(theirs.get(key), (str, list))
    }
    metadata |= licence or _licence_of_files(source_directory)
    if isinstance(theirs.get("language"), (str, list)):
        metadata["language"] = theirs["language"]
    tag = theirs.get("pipeline_tag")
    metadata["pipeline_tag"] = tag if isinstance(tag, str) else "text-generation"
    metadata["tags"] = ["pruned", "depth-pruning", "layer-pruning", "simdiff"]
    return metadata


def _front_matter(directory: Path | None) -> dict[str, Any]:
    """The metadata header of a model's card; empty if there is none that can be read."""
    if directory is None or not (directory / CARD).is_file():
        return {}
    match = _FRONT_MATTER.match((directory / CARD).read_text(encoding="utf-8", errors="replace"))
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _origin(directory: Path | None) -> str | None:
    """The hub name in the config of a local copy; None if it has none."""
    if directory is None:
        return None
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def licence_files(directory: Path) -> list[str]:
    """Names of the files that the licence of a model requires to be passed on."""
    names = [*_LICENCE_FILES, "NOTICE", "NOTICE.txt", "USE_POLICY.md"]
    link = _front_matter(directory).get("license_link")
    # A link without a scheme names a file of the model; files outside its directory do not count.
    if isinstance(link, str) and "/" not in link and "\\" not in link and link != CARD:
        names.append(link)
    return [name for name in dict.fromkeys(names) if (directory / name).is_file()]


def _licence_of_files(directory: Path | None) -> dict[str, Any]:
    names = [] if directory is None else licence_files(directory)
    for name in names:
        if name not in _LICENCE_FILES or directory is None:
            continue
        start = (directory / name).read_text(encoding="utf-8", errors="replace")[:2000]
        for pattern, licence in _LICENCES:
            if re.search(pattern, start):
                return {"license": licence}
        return {
            "license": "other",
            "license_name": "license-of-the-base-model",
            "license_link": name,
        }
    return {}
