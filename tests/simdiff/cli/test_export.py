"""`simdiff export` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from simdiff import cli
from support.plans import plan_for


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.txt"
    plan_for(6, (4, 1)).save(plan)
    assert cli.main(["export", str(plan), "--format", "llama.cpp"]) == 0
    assert capsys.readouterr().out == "1,4\n"
    assert cli.main(["export", str(plan), "--format", "list", "-o", str(out)]) == 0
    assert out.read_text() == "1\n4\n"
    capsys.readouterr()
    assert cli.main(["export", str(plan), "--format", "list", "-o", str(out)]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert cli.main(["export", str(plan), "--format", "mergekit", "--model", "a/b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["kept_runs"] == [[0, 1], [2, 4], [5, 6]]
    assert yaml.safe_load(content["text"])["slices"][1]["sources"][0]["layer_range"] == [2, 4]
    plan.write_text("{}")
    assert cli.main(["export", str(plan), "--format", "list"]) == 2
