"""The table of docs/install.md is that of its result; the files of a release say what they must."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MATRIX = runpy.run_path(str(ROOT / "tools" / "install_matrix.py"))
PAGE = (ROOT / "docs" / "install.md").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_page_shows_the_result() -> None:
    result = json.loads(MATRIX["RESULT"].read_text())
    assert MATRIX["with_table"](PAGE, result) == PAGE
    assert re.search(r"-cp310-abi3-\w*linux\w*_x86_64\.whl$", result["wheel"]["name"])
    assert result["wheel"]["bytes"] <= 15e6
    assert {cell["python"].rsplit(".", 1)[0] for cell in result["cells"]} <= set(MATRIX["PYTHONS"])
    assert not any(cell["problems"] for cell in result["cells"])


def test_a_failed_pair_and_one_that_was_not_run_are_told() -> None:
    cell = {
        "python": "3.12.1",
        "torch": "2.11.0+cpu",
        "triton": "3.6.0",
        "problems": {"opcheck": "x"},
    }
    wheel = {"name": "a.whl", "bytes": 1}
    result = {"wheel": wheel, "date": "2026-01-01", "machine": "Linux", "cells": [cell]}
    lines = MATRIX["table"](result).splitlines()
    assert "| 2.11.0 | 3.6.0 | not run | not run | failed: opcheck | not run |" in lines
    assert "| 2.15.0 |  | no torch | not run | not run | not run |" in lines


def test_each_architecture_of_the_build_has_its_line() -> None:
    text = (ROOT / "setup.py").read_text()
    listed = re.findall(r'^    "(\d+)": "', text, flags=re.MULTILINE)
    assert len(listed) == 7
    assert re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE) == listed


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_can_be_read(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]  # `on` is a boolean to YAML
    assert workflow["permissions"]["contents"] == "read"
    for job in workflow["jobs"].values():
        assert "uses" in job or job["steps"]
        for step in job.get("steps", ()):
            assert ("uses" in step) != ("run" in step)
            assert "@" in step.get("uses", "@")


def test_what_is_published_was_built_by_the_workflow_of_wheels() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["build"]["uses"] == "./.github/workflows/wheels.yml"
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    assert "with" not in jobs["publish"]["steps"][-1]  # no password
