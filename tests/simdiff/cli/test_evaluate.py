"""`simdiff eval` as a user runs it: table, file, messages, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simdiff import cli

SMALL = ("--num-windows", "6", "--window-length", "16")


def simdiff(*arguments: object) -> int:
    return cli.main(["eval", *map(str, arguments)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"goal": f"w{n}", "sol1": f"w{2 * n}", "sol2": f"w{n + 40} w1", "label": n % 2}
        for n in range(1, 9)
    ]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_table_and_file(
    tiny_checkpoint: Path,
    tiny_text: Path,
    data: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    small, out = tmp_path / "small", tmp_path / "results.json"
    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    text = ("--text", tiny_text, *SMALL)
    assert cli.main([*map(str, ("score", tiny_checkpoint, *text, "-o", scores))]) == 0
    assert cli.main([*map(str, ("plan", scores, "--num-layers", 2, "-o", plan))]) == 0
    assert cli.main([*map(str, ("prune", tiny_checkpoint, "--plan", plan, "-o", small))]) == 0
    capsys.readouterr()
    tasks = ("--tasks", "piqa", "--task-data", data, "--limit", 7)
    assert simdiff(tiny_checkpoint, small, *text, "--stride", 4, *tasks, "-o", out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    content = json.loads(out.read_text())
    assert content["schema"] == "simdiff.evaluation"
    assert content["dense"] == str(tiny_checkpoint)
    assert content["command"].startswith(f"simdiff eval {tiny_checkpoint}")
    dense, pruned = (content["models"][str(path)] for path in (tiny_checkpoint, small))
    assert (pruned["num_tokens"], pruned["evaluation"]["stride"]) == (15 + 5 * 4, 4)
    made = json.loads(plan.read_text())
    assert (pruned["removed"], pruned["cut_from"], dense["fingerprint"]) == (
        sorted(made["removed"]),
        made["model"]["fingerprint"],
        made["model"]["fingerprint"],
    )
    assert "removed" not in dense
    assert len(pruned["tasks"]["piqa"]["items"]) == 7
    for wanted in (
        f"{dense['perplexity']:.2f} ({dense['low']:.2f} to {dense['high']:.2f})",
        f"{pruned['against_dense']['ratio']:.3f}",
        f"{100 * pruned['tasks']['piqa']['value']:.1f} ±",
        "average without tasks at chance",
        "stride 4, no BOS",
        "7 items of each, drawn at random",
    ):
        assert wanted in printed, wanted


def test_the_whole_text(tiny_checkpoint: Path, tiny_text: Path, capsys) -> None:
    options = ("--window-length", 16, "--num-windows", 0, "--stride", 8, "--json")
    assert simdiff(tiny_checkpoint, "--text", tiny_text, *options) == 0
    result = json.loads(capsys.readouterr().out)["models"][str(tiny_checkpoint)]
    assert result["num_tokens"] == 19 * 30 - 1  # paragraphs behind the middle piece


def test_refusals(
    tiny_checkpoint: Path,
    tiny_text: Path,
    data: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    text = ("--text", tiny_text, *SMALL)
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        (mute / name).write_bytes((tiny_checkpoint / name).read_bytes())
    earlier = tmp_path / "earlier.json"
    earlier.write_text("{}")
    out = ("-o", tmp_path / "out.json")
    cases = [
        ([tiny_checkpoint], "--text, --tasks or both must be given"),
        ([tiny_checkpoint, tiny_checkpoint, *text], "each model must be given once"),
        ([mute, *text], "must have a tokenizer, and its directory holds no file of one"),
        ([tiny_checkpoint, *text, "-o", earlier], "must not exist yet"),
        ([tiny_checkpoint, "--text", tiny_text, "--window-length", 900], "must fill one window"),
        ([tiny_checkpoint, *text, "--stride", 17], "stride must be 1 to 16 tokens"),
        ([tiny_checkpoint, "--tasks", "pika", "--task-data", data], "did you mean piqa?"),
        ([tiny_checkpoint, "--tasks", "piqa", "--task-data", tmp_path / "no"], "no: No such file"),
        ([tiny_checkpoint, "--tasks", ","], "at least one name"),
    ]
    for arguments, wanted in cases:
        before = sorted(tmp_path.iterdir())
        target = () if "-o" in arguments else out
        assert simdiff(*arguments, *target) == 2, arguments
        message = capsys.readouterr().err
        assert wanted in message, (arguments, message)
        left = [path for path in tmp_path.iterdir() if path not in before]
        assert [path.name for path in left if path.name != "cache"] == []
