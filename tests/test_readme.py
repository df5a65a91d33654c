"""The README's Python runs, and its commands are accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.model
@pytest.mark.parametrize("block", range(2))
def test_quick_start_runs(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(BLOCKS[block], names)
    if block == 0:
        config = json.loads((tmp_path / "pruned" / "config.json").read_text())
        assert config["num_hidden_layers"] == 23
    else:
        assert capsys.readouterr().out.count("tensor(") == 3


def test_every_command_of_the_readme_is_accepted() -> None:
    from simdiff.cli import parser

    commands = re.findall(r"^simdiff (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        parser().parse_args(command.split())


@pytest.mark.model
def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "pruned", "recovered", "scores.json",
    ]  # fmt: skip
