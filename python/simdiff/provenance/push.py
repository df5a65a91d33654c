"""Upload of a pruned directory to a model hub, by huggingface_hub."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from simdiff.errors import SimdiffError
from simdiff.io.kinds import PLAN_FILE
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.origin import CARD

TAG = "pruned"
# Made by the hub.
_ATTRIBUTES = ".gitattributes"
_HEADER = re.compile(r"\A---[ \t]*\r?\n(.*?\n)---[ \t]*\r?\n", re.DOTALL)


@dataclass(frozen=True)
class Push:
    """What goes to a hub, or went."""

    repository: str
    directory: Path
    files: dict[str, int]
    """Sizes in bytes by path."""
    card: str
    """The model card as it is uploaded; the directory's own stays as it is."""
    added: tuple[str, ...]
    """What the card of the directory did not have, in words."""
    url: str | None = None
    """Where it is; None before it is uploaded."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"directory": str(self.directory), "added": list(self.added)}


def prepared(directory: Path, repository: str) -> Push:
    """What would go to a repository: nothing is sent.

    A directory of `simdiff run` stands for the model/ in it.

    Args:
        directory: a pruned checkpoint with its plan.json and README.md.
        repository: OWNER/NAME, or NAME for the user's own.

    Raises:
        SimdiffError: simdiff did not write the directory, its card is damaged, or the name is none.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SimdiffError(f"push: the repository must be OWNER/NAME: {_one_line(error)}") from None
    if (directory / "model" / PLAN_FILE).is_file() and not (directory / "config.json").exists():
        directory = directory / "model"
    missing = [n for n in (PLAN_FILE, "config.json", CARD) if not (directory / n).is_file()]
    if missing:
        raise SimdiffError(
            f"push {directory}: must be a pruned model that simdiff wrote, but has no "
            f"{' and no '.join(missing)}"
        )
    plan = PruningPlan.load(directory / PLAN_FILE)
    card, added = completed((directory / CARD).read_text(encoding="utf-8"), plan, directory)
    files = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    files[CARD] = len(card.encode())
    return Push(repository, directory, files, card, added)


def completed(card: str, plan: PruningPlan, directory: Path) -> tuple[str, tuple[str, ...]]:
    """A card whose metadata name the base model and the tag "pruned", and what had to be added.

    Raises:
        SimdiffError: the metadata are none that huggingface_hub reads.
    """
    from huggingface_hub import ModelCard, ModelCardData

    match = _HEADER.match(card)
    try:
        header = yaml.safe_load(match[1]) if match else {}
        metadata = ModelCardData(**header).to_dict()
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise SimdiffError(
            f"push {directory / CARD}: its metadata must be those of a model card: "
            f"{_one_line(error)}"
        ) from None
    changes: dict[str, Any] = {}
    name = str(plan.model.get("name") or "")
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    if not metadata.get("base_model") and known:
        changes["base_model"] = name
    tags = metadata.get("tags") or []
    if TAG not in tags:
        changes["tags"] = [*tags, TAG]
    if not changes:
        return card, ()
    written = yaml.safe_dump(header | changes, sort_keys=False, allow_unicode=True, width=10**9)
    text = f"---\n{written}---\n{card[match.end() if match else 0 :]}"
    assert ModelCard(text).data.to_dict()["tags"]
    return text, tuple(f"{key}: {value}" for key, value in changes.items())


def push(found: Push, *, private: bool = False, update: bool = False) -> Push:
    """Upload what `prepared` found, in one commit.

    Args:
        found: the files, the card and the repository.
        private: make a repository that only its owner sees.
        update: add a commit to a repository that exists; files that it has alone are removed.

    Raises:
        SimdiffError: nobody is logged in, the repository exists, the hub refuses the card, or it
            cannot be reached.
    """
    from huggingface_hub import (
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        ModelCard,
        get_token,
    )
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"push to {found.repository}"
    if not get_token():
        raise SimdiffError(f"{where}: needs a login: `hf auth login`, or the variable HF_TOKEN")
    api = HfApi(library_name="simdiff")
    try:
        if not update and api.repo_exists(found.repository):
            raise SimdiffError(
                f"{where}: must not exist yet; give another name, or --update for a new commit"
            )
        ModelCard(found.card).validate(repo_type="model")
        url = api.create_repo(found.repository, private=private or None, exist_ok=update)
        gone = set(api.list_repo_files(url.repo_id)) - {*found.files, _ATTRIBUTES} if update else ()
        api.create_commit(
            url.repo_id,
            [
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(gone)),
                *(CommitOperationAdd(name, _content(found, name)) for name in found.files),
            ],
            commit_message=f"Upload {_summary(found.directory)}",
        )
    except OfflineModeIsEnabled:
        raise SimdiffError(f"{where}: HF_HUB_OFFLINE is set, so no hub is asked") from None
    except HfHubHTTPError as error:
        raise SimdiffError(f"{where}: the hub refuses: {_one_line(error)}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, SimdiffError):
            raise
        raise SimdiffError(f"{where}: {_one_line(error)}") from None
    return Push(**vars(found) | {"repository": url.repo_id, "url": str(url)})


def _content(found: Push, name: str) -> bytes | Path:
    return found.card.encode() if name == CARD else found.directory / name


def _summary(directory: Path) -> str:
    content = json.loads((directory / PLAN_FILE).read_text(encoding="utf-8"))
    return f"a model without {len(content['removed'])} of its layers"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
