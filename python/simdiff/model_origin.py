"""Where a pruned model comes from: its base model, licence and language, for the model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.hub import cached_file

from simdiff.demo import DEMO, demo_model
from simdiff.selection import PruningPlan

CARD = "README.md"
# What the demo's file says of itself (general.license, general.organization).
_DEMO_SOURCE = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "language": ["en"],
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# How a licence file starts, and what the hub calls it.
_LICENCES = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License|Permission is hereby granted, free of charge", "mit"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"BSD 3-Clause", "bsd-3-clause"),
)
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def source_folder(source: str | Path) -> Path | None:
    """Where the files of a model are: a directory, or the snapshot of a hub name.

    The card and the licence of a hub name are fetched if they can be: loading a model does not.
    """
    if source == DEMO:
        return demo_model()
    if Path(source).is_dir():
        return Path(source)
    found = None
    for name in ("config.json", CARD, *_LICENCE_FILES, "NOTICE"):
        try:
            file = cached_file(str(source), name)
        except (OSError, ValueError):  # no such file, no such name, no network
            continue
        found = Path(file).parent if file and found is None else found
    return found


def source_metadata(plan: PruningPlan, source_directory: Path | None) -> dict[str, Any]:
    """The header of the card: what the source's own card says of licence and language, and ours."""
    name = str(plan.model.get("name") or "")
    theirs = _front_matter(source_directory)
    if name == DEMO:
        theirs = {**_DEMO_SOURCE, **theirs}
    elif _HUB_NAME.fullmatch(name) and not Path(name).exists():
        theirs["base_model"] = name
    else:  # a local model: a card of its own names what that one was made from
        theirs["base_model"] = _origin(source_directory)
    metadata: dict[str, Any] = {"library_name": "transformers"}
    if theirs.get("base_model"):
        metadata["base_model"] = theirs["base_model"]
        # The hub knows finetune, merge, quantized and adapter; weights that differ are the first.
        metadata["base_model_relation"] = "finetune"
    licence = {key: theirs[key] for key in ("license", "license_name", "license_link")
               if isinstance(theirs.get(key), (str, list))}  # fmt: skip
    metadata |= licence or _licence_of_files(source_directory)
    if isinstance(theirs.get("language"), (str, list)):
        metadata["language"] = theirs["language"]
    tag = theirs.get("pipeline_tag")
    metadata["pipeline_tag"] = tag if isinstance(tag, str) else "text-generation"
    metadata["tags"] = ["pruned", "depth-pruning", "layer-pruning", "simdiff"]
    return metadata


def _front_matter(directory: Path | None) -> dict[str, Any]:
    """The header of a model's own card; empty where there is none that can be read."""
    if directory is None or not (directory / CARD).is_file():
        return {}
    match = _FRONT_MATTER.match((directory / CARD).read_text(encoding="utf-8", errors="replace"))
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _origin(directory: Path | None) -> str | None:
    """The hub name that a local copy's config remembers, if it does."""
    if directory is None:
        return None
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def licence_files(directory: Path) -> list[str]:
    """The files of a model that its licence asks to pass on."""
    names = [*_LICENCE_FILES, "NOTICE", "NOTICE.txt", "USE_POLICY.md"]
    link = _front_matter(directory).get("license_link")
    # A link without a scheme names a file of the model; nothing outside its directory is taken.
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
        return {"license": "other", "license_name": "license-of-the-base-model",
                "license_link": name}  # fmt: skip
    return {}
