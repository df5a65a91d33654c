"""The command as a user runs it: outputs, exit codes, messages, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simdiff.data.text import token_windows
from simdiff.planning import names
from simdiff.planning.criteria import CRITERIA
from simdiff_kernels import BACKENDS
from support.commands import SMALL, simdiff
from support.pages import References


def test_run(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    code = simdiff("run", tiny_checkpoint, "--text", tiny_text, "--ratio", "0.4", "-o", out, *SMALL)
    assert code == 0
    printed = capsys.readouterr().out
    assert sorted(entry.name for entry in out.iterdir()) == [
        "config.yaml",
        "model",
        "plan.json",
        "report.html",
        "results.json",
        "scores.json",
    ]
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["removed"]) == 2
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.num_hidden_layers == 4
    AutoTokenizer.from_pretrained(out / "model")
    results = json.loads((out / "results.json").read_text())
    assert (results["num_layers"], results["removed"]) == (6, plan["removed"])
    order = ", ".join(map(str, plan["removed"]))
    for text in (
        "held-out perplexity",
        f"{results['pruned']['perplexity']:.2f}",
        "decode, tokens/s",
        f"Removed, the least important first: {order}",
        str(out / "report.html"),
    ):
        assert text in printed
    assert results["pruned"]["generation"]["equals_uncached"]
    speed = results["pruned"]["speed"]
    assert (speed["decoding"], speed["prompt_tokens"]) == ("eager, dynamic cache", 16)
    assert f"{speed['times_faster']['decode']:.3f}" in printed
    page = References()
    page.feed((out / "report.html").read_text())
    # importance, two of confidence, four metrics, all blocks, two of speed
    assert len(page.alternatives) == 10
    assert all(page.alternatives)
    assert all(url.startswith("data:") for url in page.urls)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_steps_give_what_run_gives(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    text = ("--text", tiny_text, *SMALL)
    scores, plan, small = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "small"
    assert simdiff("score", tiny_checkpoint, *text, "-o", scores) == 0
    assert simdiff("plan", scores, "--num-layers", 2, "--protect", "0,4-5", "-o", plan) == 0
    removed = json.loads(plan.read_text())["removed"]
    assert not set(removed) & {0, 4, 5}
    assert simdiff("prune", tiny_checkpoint, "--plan", plan, "-o", small) == 0
    capsys.readouterr()
    assert simdiff("eval", tiny_checkpoint, small, *text, "--json") == 0
    evaluated = json.loads(capsys.readouterr().out)["models"]
    model = AutoModelForCausalLM.from_pretrained(small).eval()
    tokenizer = AutoTokenizer.from_pretrained(small)
    windows = token_windows(
        str(tiny_text), tokenizer, part="held-out", num_windows=4, window_length=16
    ).tokens
    with torch.no_grad():  # transformers' own loss on the same windows
        wanted = torch.stack([model(input_ids=w, labels=w).loss for w in windows.split(1)]).mean()
    assert evaluated[str(small)]["nll"] == pytest.approx(wanted.item(), rel=1e-5)
    assert evaluated[str(small)]["num_tokens"] == 4 * 15


def test_a_plan_with_the_model_chooses_as_a_run_does(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    text = ("--text", tiny_text, *SMALL)
    out, scores, plan = tmp_path / "out", tmp_path / "s.json", tmp_path / "p.json"
    options = ("--speed-up", "1.3", "--max-blocks", "2")
    assert simdiff("run", tiny_checkpoint, *text, *options, "-o", out) == 0
    whole = json.loads((out / "plan.json").read_text())
    assert simdiff("score", tiny_checkpoint, *text, "-o", scores) == 0
    with_model = ("--model", tiny_checkpoint, *options, "-o", plan)
    assert simdiff("plan", scores, *with_model) == 0
    again = json.loads(plan.read_text())
    for key in ("removed", "selection", "candidates"):
        assert again[key] == whole[key]
    losses = {candidate["origin"]: candidate["nll"] for candidate in again["candidates"]}
    assert losses[again["selection"]] == min(losses.values())
    assert simdiff("plan", scores, *options, "--overwrite", "-o", plan) == 0
    assert json.loads(plan.read_text())["removed"]  # no model: the first candidate
    assert json.loads(plan.read_text())["candidates"] == []
    tiny_text.write_text("w1 " * 400)
    capsys.readouterr()
    assert simdiff("plan", scores, *with_model, "--overwrite") == 2
    assert "as it was when the scores were made" in capsys.readouterr().err


def test_json_output_is_json(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "s.json"
    assert simdiff("score", tiny_checkpoint, "--text", tiny_text, *SMALL, "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 6
    assert simdiff("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in info["backends"]] == list(BACKENDS)
    assert info["default_backend"]["cpu"] == "cpu"
    assert ("cuda" in info["default_backend"]) == torch.cuda.is_available()


def refusals(checkpoint: Path, text: Path, folder: Path) -> list[tuple[list[object], str]]:
    short = folder / "short.txt"
    short.write_text("w1 w2 w3\n\nw4")
    empty, broken = folder / "empty.txt", folder / "broken.jsonl"
    empty.write_text(" \n\n ")
    broken.write_text('{"txt": 1}\n')
    plan = folder / "plan.json"
    plan.write_text("{}")
    exists = folder / "exists"
    exists.mkdir()
    (exists / "thesis.tex").write_text("precious")
    ours = folder / "ours"
    ours.mkdir()
    (ours / "plan.json").write_text("{}")
    run = ["run", checkpoint, "--text", text, *SMALL]
    out = ["-o", folder / "never"]
    return [
        ([*run, *out, "--ratio", "1.0"], "above 0 and below 1, got 1.0"),
        ([*run, *out, "--num-layers", "6"], "1 to 5 of 6, got 6"),
        (
            [*run, *out, "--criterion", "simdiff-mssd", "--alpha", "2"],
            "alpha must be in [0, 1], got 2.0",
        ),
        ([*run, *out, "--alpha", "0.9"], "--alpha has an effect only with a criterion that weighs"),
        ([*run, *out, "--protect", "9"], "indices from 0 to 5, got 9"),
        ([*run, "-o", exists], "must not exist yet"),
        ([*run, "-o", exists, "--overwrite"], "is nothing that simdiff wrote"),
        (["score", *run[1:], "-o", ours, "--overwrite"], "must be a file, but is a directory"),
        ([*run, "-o", folder / "no" / "parent"], "parent directory must exist"),
        (["run", folder / "nothing", "--text", text, *out], "nothing: no such directory"),
        (["run", folder, "--text", text, *out], "holds no config.json: give one of"),
        (["run", checkpoint, "--text", short, *SMALL, *out], "fill one window of 16 tokens"),
        (["run", checkpoint, "--text", empty, *SMALL, *out], "must hold text"),
        (["run", checkpoint, "--text", broken, *SMALL, *out], "line 1 must be a JSON object"),
        (["run", checkpoint, "--text", folder / "none.txt", *SMALL, *out], "'demo': No such file"),
        (["run", checkpoint, "--text", text, "--num-windows", "0", *out], "at least 1"),
        ([*run, *out, "--device", "cuda"], "without a GPU"),
        ([*run, *out, "--device", "warp"], "cpu, cuda, cuda:N or auto, got 'warp'"),
        (["plan", folder / "none.json", *out], "No such file"),
        (["prune", checkpoint, "--plan", plan, *out], "got schema None"),
    ]


def test_refusals(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys) -> None:
    for arguments, wanted in refusals(tiny_checkpoint, tiny_text, tmp_path):
        if wanted == "without a GPU" and torch.cuda.is_available():
            continue
        before = sorted(tmp_path.rglob("*"))
        code = simdiff(*arguments)
        message = capsys.readouterr().err
        assert code == 2, arguments
        assert wanted in message, (arguments, message)
        assert sorted(tmp_path.rglob("*")) == before, "a refused call must write nothing"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run", "simdiff run: error: the following"),
        ("plan", "simdiff plan: error: the following"),
        ("cut", "simdiff: error: argument COMMAND"),
        ("run m --protect a", "simdiff run: error: argument --protect"),
        ("info more", "simdiff info: error: there must be no more arguments, got more"),
        ("verify a b c", "simdiff verify: error: there must be no more arguments, got b c"),
        ("-V", "simdiff: error: there is no option -V"),
        ("--quiet info", "simdiff: error: --quiet must stand behind the command"),
    ],
)
def test_wrong_usage(command: str, told: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        simdiff(*command.split())
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_nan_in_the_model_is_a_message(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tiny_checkpoint)
    out = tmp_path / "s.json"
    assert simdiff("score", tiny_checkpoint, "--text", tiny_text, *SMALL, "-o", out) == 2
    assert "NaN or Inf in layer 2: 64 of 64 tokens" in capsys.readouterr().err
    assert not out.exists()


def test_overwrite_replaces_only_what_simdiff_wrote(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, text = tmp_path / "out", ("--text", tiny_text, *SMALL, "--speed-rounds", 0)
    assert simdiff("run", tiny_checkpoint, *text, "-o", out) == 0
    assert "tokens/s" not in capsys.readouterr().out, "no speed test was made"
    assert "speed" not in json.loads((out / "results.json").read_text())["dense"]
    assert "<h2>Speed" not in (out / "report.html").read_text()
    first = (out / "plan.json").read_text()
    from simdiff.jobs import run as pipeline

    with monkeypatch.context() as patch:  # a run that dies late leaves the earlier output
        patch.setattr(pipeline, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert simdiff("run", tiny_checkpoint, *text, "-o", out, "--overwrite") == 130
    assert (out / "plan.json").read_text() == first
    command = ("run", tiny_checkpoint, *text, "-o", out, "--overwrite", "--num-layers", 3)
    assert simdiff(*command) == 0
    assert len(json.loads((out / "plan.json").read_text())["removed"]) == 3
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_help_is_quick_and_complete() -> None:
    code = (
        "import sys; from simdiff import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("run", "score", "plan", "prune", "eval", "info"):
        assert f"\n    {command}" in result.stdout


def test_every_criterion_can_be_named() -> None:
    assert tuple(CRITERIA) == names.CRITERIA
    assert set(names.SWEPT.values()) == {n for n, c in CRITERIA.items() if c.takes_alpha}
