"""Results on standard output, previews, and how much is said beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simdiff import cli
from support.commands import SMALL, simdiff


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model."""
    import torch

    from simdiff.scoring.calibration_pass import score
    from support.tiny_models import make_tiny

    tokens = torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("output") / "scores.json"
    score(make_tiny("llama"), [tokens], name="org/tiny", progress=False).save(path)
    return path


def test_a_plan_is_a_preview_a_file_or_text_on_standard_output(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ("plan", scores, "--ratio", "0.4")
    assert simdiff(*plan) == 0
    shown = capsys.readouterr().out
    assert "This is a preview; --output plan.json keeps the plan." in shown
    assert "4 of 6 layers stay: " in shown
    assert "asked for: a share of 0.4 of the layers to go" in shown
    assert list(tmp_path.iterdir()) == []
    assert simdiff(*plan, "-o", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == [], "no file of the name -"
    assert simdiff(*plan, "-o", "plan.json") == 0
    capsys.readouterr()
    written = json.loads(Path("plan.json").read_text())
    assert printed.keys() == written.keys()
    assert printed["removed"] == written["removed"]
    assert (written["asked"], written["outcome"]["num_layers"]) == ({"ratio": 0.4}, [6, 4])
    assert simdiff("export", "plan.json", "--format", "list", "-o", "-") == 0
    assert sorted(map(int, capsys.readouterr().out.split())) == sorted(written["removed"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_what_scores_read_goes_to_standard_output(
    tiny_checkpoint: Path, tiny_text: Path, capsys
) -> None:
    text = ("--text", tiny_text, *SMALL)
    assert simdiff("score", tiny_checkpoint, *text, "-o", "-", "--quiet") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["schema"] == "simdiff.scores"
    assert told.err == "", "--quiet"
    assert simdiff("profile", tiny_checkpoint, *text, "-o", "-", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "simdiff.trace"


@pytest.mark.parametrize("words", [[], ["help"], ["--help"]])
def test_the_commands_are_listed(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in cli.COMMANDS)


def test_help_of_a_command(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["help", "plan"])
    assert "usage: simdiff plan SCORES" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plam", "x"], "simdiff: error: argument COMMAND: got 'plam'; did you mean plan?\n"),
        (
            ["plan", "x", "--criterion", "simdif"],
            "simdiff plan: error: argument --criterion: got 'simdif'; did you mean simdiff?\n",
        ),
        (["plan", "x", "--criterion", "mssd"], "got 'mssd'; did you mean simdiff-mssd?\n"),
        (["plan", "x", "--ratio", "a"], "argument --ratio: invalid float value: 'a'\n"),
        (["score", "m"], "error: the following arguments are required: --output/-o\n"),
    ],
)
def test_an_error_of_usage_stands_alone(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.endswith(said)
    assert told.count("\n") == 1


def test_verbose_tells_where_an_error_came_from(tmp_path: Path, capsys) -> None:
    assert simdiff("plan", tmp_path / "none.json", "--verbose") == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("simdiff plan: error: ")


def test_closed_streams(scores: Path) -> None:
    """A process started with its output closed, and a reader that goes away."""
    command = f"{sys.executable} -m simdiff.cli plan {scores} --bootstrap 0"
    for line in (f"{command} >&- 2>err; cat err >&2", f"{command} -o - | true", f"{command} 2>&-"):
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, cwd=scores.parent
        )
        assert (done.returncode, "Error" in done.stderr) == (0, False), line
