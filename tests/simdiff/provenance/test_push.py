"""What is uploaded, to a hub that keeps it in memory; nothing is sent that must not be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationDelete, HfApi, ModelCard

from simdiff.errors import SimdiffError
from simdiff.provenance.card import write_card
from simdiff.provenance.push import completed, prepared, push
from support.commands import simdiff
from support.plans import plan_for


class Hub:
    """The calls of HfApi that an upload makes."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.validated: list[str] = []
        self.private: bool | None = None

    def repo_exists(self, repo_id: str, *, repo_type: str | None = None) -> bool:
        return repo_id in self.repositories

    def create_repo(
        self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False
    ) -> Any:
        self.private = private
        assert exist_ok or repo_id not in self.repositories
        self.repositories.setdefault(repo_id, {})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def list_repo_files(self, repo_id: str) -> list[str]:
        return list(self.repositories[repo_id])

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> None:
        assert commit_message == "Upload a model without 2 of its layers"
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del self.repositories[repo_id][operation.path_in_repo]
            else:
                with operation.as_file() as file:
                    self.repositories[repo_id][operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    for name in ("repo_exists", "create_repo", "list_repo_files", "create_commit"):
        method = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda self, *a, _m=method, **k: _m(*a, **k))
    monkeypatch.setattr(
        ModelCard, "validate", lambda self, repo_type: hub.validated.append(self.content)
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return hub


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    (path / ".cache").mkdir(parents=True)
    (path / ".cache" / "secret").write_text("x")
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    plan = plan_for(6, (4, 1), name="org/model-7B")
    plan.save(path / "plan.json")
    write_card(path, plan, tmp_path)
    return path


def test_all_files_and_the_card(hub: Hub, pruned: Path) -> None:
    found = push(prepared(pruned, "me/small"), private=True)
    sent = hub.repositories["me/small"]
    assert set(sent) == {"config.json", "model.safetensors", "plan.json", "README.md"}
    assert sent["model.safetensors"] == b"weights"
    assert {name: len(content) for name, content in sent.items()} == found.files
    assert found.url == "https://huggingface.co/me/small"
    assert hub.private
    metadata = ModelCard(sent["README.md"].decode()).data.to_dict()
    assert metadata["base_model"] == "org/model-7B"
    assert "pruned" in metadata["tags"]
    assert hub.validated == [sent["README.md"].decode()]
    assert found.added == ()


def test_a_repository_that_exists(hub: Hub, pruned: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", ".gitattributes": b"lfs", "config.json": b""}
    hub.repositories["me/small"] = dict(old)
    with pytest.raises(SimdiffError, match="must not exist yet; .*--update"):
        push(prepared(pruned, "me/small"))
    assert hub.repositories["me/small"] == old
    push(prepared(pruned, "me/small"), update=True)
    wanted = {".gitattributes", "config.json", "model.safetensors", "plan.json", "README.md"}
    assert set(hub.repositories["me/small"]) == wanted
    assert hub.repositories["me/small"]["config.json"] == b"{}"


def test_what_the_card_lacks_is_added(pruned: Path) -> None:
    plan = plan_for(6, (4, 1), name="org/model-7B")
    text, added = completed("---\ntags:\n- mine\nlicense: mit\n---\n# By hand\n", plan, pruned)
    assert ModelCard(text).data.to_dict() == {
        "tags": ["mine", "pruned"],
        "license": "mit",
        "base_model": "org/model-7B",
    }
    assert text.endswith("---\n# By hand\n")
    assert added == ("base_model: org/model-7B", "tags: ['mine', 'pruned']")
    text, _ = completed("# No metadata\n", plan_for(6, (1,), name="/home/me/model"), pruned)
    assert text == "---\ntags:\n- pruned\n---\n# No metadata\n"


@pytest.mark.parametrize("header", ["a: [", "- a", "model-index: [{name: x}]\nlicense: {"])
def test_metadata_that_the_hub_cannot_read(pruned: Path, header: str) -> None:
    (pruned / "README.md").write_text(f"---\n{header}\n---\n")
    with pytest.raises(
        SimdiffError, match=r"README.md: its metadata must be those of a model card"
    ):
        prepared(pruned, "me/small")


def test_what_is_refused(hub: Hub, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b/c", "me/sm all", "-x"):
        with pytest.raises(SimdiffError, match="must be OWNER/NAME"):
            prepared(pruned, name)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SimdiffError, match="needs a login: `hf auth login`"):
        push(prepared(pruned, "me/small"))

    def offline(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("no")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(HfApi, "repo_exists", offline)
    with pytest.raises(SimdiffError, match="HF_HUB_OFFLINE is set"):
        push(prepared(pruned, "me/small"))

    def forbidden(*_: object, **__: object) -> None:
        response = SimpleNamespace(status_code=403, headers={}, request=None)
        raise huggingface_hub.errors.HfHubHTTPError("403 Forbidden:\nno rights", response=response)

    monkeypatch.setattr(HfApi, "repo_exists", forbidden)
    with pytest.raises(SimdiffError, match="the hub refuses: 403 Forbidden: no rights$"):
        push(prepared(pruned, "me/small"))
    assert hub.repositories == {}
    (pruned / "plan.json").unlink()
    with pytest.raises(SimdiffError, match="that simdiff wrote, but has no plan.json$"):
        prepared(pruned, "me/small")


def test_the_command(hub: Hub, pruned: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pruned.rename(out / "model")  # as `simdiff run` leaves it
    assert simdiff("push", out, "me/small", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"]["model.safetensors"] == 7
    assert hub.repositories == {}
    assert simdiff("push", out, "me/small") == 0
    assert "4 files" in capsys.readouterr().out
    assert simdiff("push", out, "me/small") == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert simdiff("push", tmp_path, "me/small", "--dry-run") == 2
    assert sys.modules["simdiff.provenance.push"]
